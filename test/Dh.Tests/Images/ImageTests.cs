using System.Text;
using Dh.Images;
using Dh.TestSupport;

namespace Dh.Tests.Images;

public sealed class ImageTests
{
    private static readonly Template Template = Template.Parse("name = \"t\"\npackages = [\"bb\", \"aa\"]\n", "t.toml");

    [Fact]
    public async Task A_finished_image_reads_as_it_was_written()
    {
        using var directory = new TempDir();
        var written = await WriteAsync(directory);

        var image = Image.Open(directory.Path);

        Assert.Equal(written.ToJson(), image.ToJson());
        Assert.Equal(directory[Image.RootDiskName], image.RootDiskPath);
        await image.VerifyAsync(TestContext.Current.CancellationToken);
        Assert.Contains("\"version\": \"1.0+b1\"", Encoding.UTF8.GetString(written.ToJson()), StringComparison.Ordinal);
    }

    [Fact]
    public void Where_there_is_no_image_none_is_found()
    {
        using var directory = new TempDir();

        var error = Assert.Throws<DhException>(() => Image.Open(directory.Path));
        Assert.Equal($"There is no image in {directory.Path}.", error.Message);
        Assert.Equal(DhErrorReason.NotFound, error.Reason);
    }

    [Fact]
    public async Task A_file_that_is_missing_or_short_is_noticed_when_it_is_opened()
    {
        using var directory = new TempDir();
        await WriteAsync(directory);

        directory.Write(Image.InitrdName, "shor");
        Assert.Equal(
            $"{directory[Image.InitrdName]} has 4 bytes instead of 6: remove {directory.Path} and prepare again.",
            Assert.Throws<DhException>(() => Image.Open(directory.Path)).Message);

        File.Delete(directory[Image.InitrdName]);
        Assert.Equal(
            $"{directory[Image.InitrdName]} is missing: remove {directory.Path} and prepare again.",
            Assert.Throws<DhException>(() => Image.Open(directory.Path)).Message);
    }

    [Fact]
    public async Task A_changed_byte_is_noticed_when_it_is_verified()
    {
        using var directory = new TempDir();
        await WriteAsync(directory);
        directory.Write(Image.KernelName, "Kernel");

        var error = await Assert.ThrowsAsync<DhException>(() => Image.Open(directory.Path).VerifyAsync(TestContext.Current.CancellationToken));
        Assert.Equal($"{directory[Image.KernelName]} is not what was built: remove {directory.Path} and prepare again.", error.Message);
    }

    [Theory]
    [InlineData("")]
    [InlineData("null")]
    [InlineData("{}")]
    [InlineData("{\"schema\": 1, \"template\": null}")]
    public void A_manifest_that_is_none_is_refused(string text)
    {
        using var directory = new TempDir();
        directory.Write(Image.ManifestName, text);

        var error = Assert.Throws<DhException>(() => Image.Open(directory.Path));
        Assert.Equal($"{directory[Image.ManifestName]} cannot be read: remove {directory.Path} and prepare again.", error.Message);
    }

    [Fact]
    public async Task A_manifest_of_another_version_is_refused()
    {
        using var directory = new TempDir();
        var image = await WriteAsync(directory);
        directory.Write(Image.ManifestName, Encoding.UTF8.GetString((image with { Schema = 2 }).ToJson()));

        var error = Assert.Throws<DhException>(() => Image.Open(directory.Path));
        Assert.Equal($"{directory[Image.ManifestName]} has version 2, and this build of dh reads 1: remove {directory.Path} and prepare again.", error.Message);
    }

    [Fact]
    public void The_hash_is_of_what_goes_into_the_image()
    {
        using var directory = new TempDir();
        directory.Write("guest/init", "init");
        directory.Write("guest/runner.py", "pass");
        directory.Write("wheels/a-1-py3-none-any.whl", "a");
        string plain = Hash(Template);

        Assert.Equal(plain, Hash(Template));
        Assert.Equal(plain, Hash(Template with { Packages = ["aa", "bb"], MemoryMib = 1024, RecordCode = "x", Description = "y" }));
        Assert.Equal(plain, Hash(Template, wheelhouse: directory["wheels"])); // nothing is taken from there

        List<string> different =
        [
            plain,
            Hash(Template with { Packages = ["aa"] }),
            Hash(Template with { Suite = "trixie" }),
            Hash(Template with { WarmupCode = "import json" }),
            Hash(Template with { RestoreCode = "import json" }),
            Hash(Template with { Version = "1" }),
            Hash(Template, ["numpy"]),
            Hash(Template, ["numpy"], directory["wheels"]),
        ];
        directory.Write("wheels/a-1-py3-none-any.whl", "ab");
        different.Add(Hash(Template, ["numpy"], directory["wheels"]));
        directory.Write("guest/runner.py", "pass # changed");
        different.Add(Hash(Template));
        directory.Write("guest/init", "other");
        different.Add(Hash(Template));
        Assert.Equal(different.Count, different.Distinct().Count());

        string Hash(Template template, string[]? requirements = null, string? wheelhouse = null) =>
            ImageHash.Compute(template, requirements ?? [], GuestFiles.Find(directory["guest"]), wheelhouse);
    }

    [Fact]
    public async Task An_image_that_exists_is_used_and_one_that_is_damaged_is_not_found()
    {
        using var directory = new TempDir();
        directory.Write("guest/init", "init");
        var builder = new ImageBuilder(new ImageBuildOptions { ImagesDirectory = directory["images"], GuestDirectory = directory["guest"] });
        Assert.Null(builder.Find(Template));

        string hash = ImageHash.Compute(Template, [], GuestFiles.Find(directory["guest"]), null);
        string path = directory[$"images/t-{hash[..16]}"];
        await WriteAsync(path);

        Assert.Equal(path, builder.Find(Template)!.Directory);
        Assert.Equal(path, (await builder.BuildAsync(Template, cancellationToken: TestContext.Current.CancellationToken)).Directory);

        File.Delete(Path.Combine(path, Image.KernelName));
        Assert.Null(builder.Find(Template));
    }

    [Fact]
    public async Task What_is_missing_before_a_build_is_named()
    {
        using var directory = new TempDir();
        directory.Write("guest/runner.py", "");
        var token = TestContext.Current.CancellationToken;

        var incomplete = new ImageBuilder(new ImageBuildOptions { ImagesDirectory = directory["images"], GuestDirectory = directory["guest"] });
        Assert.Equal(
            $"{directory["guest/init"]} is missing: this installation of dh is incomplete; run `make build`, or install it again.",
            (await Assert.ThrowsAsync<DhException>(() => incomplete.BuildAsync(Template, cancellationToken: token))).Message);

        directory.Write("guest/init", "init");
        var options = new ImageBuildOptions { ImagesDirectory = directory["images"], GuestDirectory = directory["guest"], Wheelhouse = directory["wheels"] };
        var error = await Assert.ThrowsAsync<DhException>(() => new ImageBuilder(options).BuildAsync(Template, cancellationToken: token));
        Assert.Equal((DhErrorReason.NotFound, $"There is no wheelhouse {directory["wheels"]}."), (error.Reason, error.Message));
    }

    [Fact]
    public void A_directory_that_apt_cannot_be_told_is_refused() =>
        Assert.Throws<ArgumentException>(() => new ImageBuildOptions { ImagesDirectory = "/a\"b", GuestDirectory = "/g" });

    private static Task<Image> WriteAsync(TempDir directory) => WriteAsync(directory.Path);

    private static async Task<Image> WriteAsync(string directory)
    {
        Directory.CreateDirectory(directory);
        var image = new Image
        {
            Schema = Image.CurrentSchema,
            Template = "t",
            Hash = new string('0', 64),
            Engine = "python",
            Version = "3.11",
            PythonVersion = "3.11.2",
            KernelVersion = "6.1",
            Suite = "bookworm",
            CreatedAt = DateTimeOffset.UnixEpoch,
            Kernel = await FileAsync(Image.KernelName, "kernel"),
            Initrd = await FileAsync(Image.InitrdName, "initrd"),
            RootDisk = await FileAsync(Image.RootDiskName, "root"),
            Packages = [new ImagePackage("a", "1.0+b1", "all")],
            Wheels = [new ImageWheel("a-1-py3-none-any.whl", "00")],
        };
        await File.WriteAllBytesAsync(Path.Combine(directory, Image.ManifestName), image.ToJson(), TestContext.Current.CancellationToken);
        return image;

        async Task<ImageFile> FileAsync(string name, string content)
        {
            await File.WriteAllTextAsync(Path.Combine(directory, name), content, TestContext.Current.CancellationToken);
            return await Image.DescribeAsync(Path.Combine(directory, name), TestContext.Current.CancellationToken);
        }
    }
}
