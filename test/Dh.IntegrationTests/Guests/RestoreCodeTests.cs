using Dh.Guest;
using Dh.Preparation;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.TestSupport;

namespace Dh.IntegrationTests.Guests;

/// <summary>A template whose warm-up uses every generator before the snapshot, keeps some numbers, and whose restore code makes all but one of them anew.</summary>
public sealed class RestoreCodeTests
{
    private const string Template = """"
        name = "clones"
        version = "1"
        packages = ["python3"]
        memory_mib = 256

        [warmup]
        code = """
        import multiprocessing, os, random, secrets, socket, sqlite3, ssl, sys, tempfile, types, uuid

        random.random(), random.Random().random(), random.SystemRandom().random(), secrets.token_hex(8), uuid.uuid1(), uuid.uuid4(), tempfile.mktemp(), ssl.RAND_bytes(8)
        sqlite3.connect(':memory:').execute('select random()').fetchone()
        things = sys.modules['things'] = types.ModuleType('things')
        things.generator = random.Random()
        things.token = secrets.token_hex(8)
        things.kept = secrets.token_hex(8)
        """

        [restore]
        code = """
        def fail():
            raise PermissionError('no token today')

        if os.path.exists('/tmp/fail'):
            fail()
        things.generator.seed()
        things.token = secrets.token_hex(8)
        """
        """";

    private static CancellationToken Test => TestContext.Current.CancellationToken;

    [Fact]
    public async Task What_a_warm_up_holds_is_each_clones_own_and_no_code_runs_where_that_fails()
    {
        // Of its own, so that its snapshot is not the newest of other tests; the image stays from run to run.
        var dh = new DhProgram(Repository.PathOf("artifacts/test-home-clones"));
        var home = new DhHome(dh.Home);
        Directory.CreateDirectory(dh.Home);
        using var directory = new TempDir();
        var prepared = await dh.RunAsync(["vm", "prepare", "--force", "--vmm", "qemu", "--template", directory.Write("clones.toml", Template)], timeLimit: TimeSpan.FromMinutes(10));
        Assert.True(prepared.ExitCode == 0, $"dh vm prepare ended with {prepared.ExitCode}:\n{prepared.Output}\n{prepared.Error}");

        var snapshot = new SnapshotStore(home).FindNewest("clones")!;
        var lines = new List<string[]>();
        for (int i = 0; i < 4; i++)
        {
            await using var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = home }, Test);
            lines.Add((await RunAsync(sandbox, CloneGenerators.Code + "\nimport things; print(things.generator.random(), things.token, things.kept)")).Split((char[])[' ', '\n'], StringSplitOptions.RemoveEmptyEntries));
            if (i == 0)
            {
                // A process of its own for each run: what another run was given is not this one's either.
                Assert.NotEqual(lines[0][^2], (await RunAsync(sandbox, "import things; print(things.token)")).Trim());
            }
        }

        Assert.Empty(CloneGenerators.Alike(lines));
        Assert.Equal([4, 4, 1], new[] { 3, 2, 1 }.Select(last => lines.Select(line => line[^last]).Distinct().Count()));

        await using (var sandbox = await Sandbox.RestoreAsync(snapshot, new SandboxOptions { Home = home }, Test))
        {
            await RunAsync(sandbox, "open('/tmp/fail', 'x').close()");
            var output = new CapturedText();
            var error = await Assert.ThrowsAsync<DhException>(() => sandbox.ExecuteAsync(new ExecutionRequest { Source = "print('ran')" }, output, Test));
            Assert.Equal(
                "The template's restore code failed, and the code did not run: PermissionError: no token today. Correct [restore] in the template, then `dh vm prepare --template FILE`.",
                error.Message);
            Assert.Equal(
                "Traceback (most recent call last):\n  File \"<restore>\", line 5, in <module>\n    fail()\n  File \"<restore>\", line 2, in fail\n    raise PermissionError('no token today')\nPermissionError: no token today\n",
                output.Text);
        }
    }

    private static async Task<string> RunAsync(Sandbox sandbox, string code)
    {
        var output = new CapturedText();
        var result = await sandbox.ExecuteAsync(new ExecutionRequest { Source = code }, output, Test);
        Assert.True(result.ExitCode == 0, output.Text);
        return output.Text;
    }
}
