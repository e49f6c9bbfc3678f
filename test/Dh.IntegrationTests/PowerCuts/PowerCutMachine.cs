using System.Diagnostics;
using System.Globalization;
using System.Text;
using System.Text.RegularExpressions;
using Dh.Images;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.PowerCuts;

/// <summary>
/// A machine that runs test/power-cut on a disk: an image's kernel and its initrd, over which another archive lays another init, the program
/// and its libraries. QEMU is killed when it is disposed.
/// </summary>
internal sealed partial class PowerCutMachine : IDisposable
{
    private const int MemoryMib = 256;
    private const int InitrdAlignment = 512; // the kernel takes archives one after another, with zeros between them

    // Seconds, but for a busy host.
    private static readonly TimeSpan LineLimit = TimeSpan.FromMinutes(2);

    private readonly Process _qemu;
    private readonly StringBuilder _console = new();

    private PowerCutMachine(Process qemu) => _qemu = qemu;

    /// <summary>All that it has said.</summary>
    public string Console => _console.ToString();

    /// <summary>Makes the initrd.</summary>
    /// <param name="guest">An image's machine.</param>
    /// <param name="path">Where to.</param>
    public static async Task MakeInitrdAsync(MachineDescription guest, string path, CancellationToken cancellationToken)
    {
        string program = Repository.PathOf("artifacts/power-cut/PowerCut");
        if (!File.Exists(program))
        {
            throw new InvalidOperationException($"{program} is not there: run `make artifacts/power-cut/PowerCut` first.");
        }

        await using var initrd = File.Create(path);
        await initrd.WriteAsync(await File.ReadAllBytesAsync(guest.InitrdPath, cancellationToken), cancellationToken);
        initrd.SetLength((initrd.Length + InitrdAlignment - 1) / InitrdAlignment * InitrdAlignment);
        initrd.Position = initrd.Length;
        var archive = new CpioWriter(initrd);
        var directories = new HashSet<string>();
        await AddAsync("/init", Path.Combine(Path.GetDirectoryName(program)!, "init"));
        await AddAsync("/power-cut", program);
        foreach (string library in await LibrariesAsync(program, cancellationToken))
        {
            await AddAsync(library, library);
        }

        archive.Finish();

        async Task AddAsync(string name, string file)
        {
            const UnixFileMode Mode = (UnixFileMode)0b111_101_101;
            for (int slash = name.IndexOf('/', 1); slash > 0; slash = name.IndexOf('/', slash + 1))
            {
                if (directories.Add(name[1..slash]))
                {
                    archive.AddDirectory(name[1..slash], Mode);
                }
            }

            archive.AddFile(name[1..], Mode, await File.ReadAllBytesAsync(file, cancellationToken));
        }
    }

    /// <summary>Starts a machine.</summary>
    /// <param name="guest">An image's machine, with the host's TSC frequency.</param>
    /// <param name="initrd">What <see cref="MakeInitrdAsync"/> has made.</param>
    /// <param name="disk">Its disk, powered on.</param>
    /// <param name="mode">What the program does.</param>
    public static PowerCutMachine Start(MachineDescription guest, string initrd, LoggedDisk disk, string mode)
    {
        string command = string.Create(
            CultureInfo.InvariantCulture,
            $"console=ttyS0 quiet panic=-1 reboot=t mitigations=off random.trust_cpu=on 8250.nr_uarts=1 tsc=reliable tsc_early_khz={guest.TscKhz} -- {mode}");
        return new PowerCutMachine(Process.Start(new ProcessStartInfo(
            "qemu-system-x86_64",
            [
                "-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot",
                "-machine", "microvm,x-option-roms=off,usb=off,pcie=off", "-accel", "tcg", "-cpu", "Nehalem,spec-ctrl=off", "-smp", "1", "-m", $"{MemoryMib}M",
                "-kernel", guest.KernelPath, "-initrd", initrd, "-append", command, "-serial", "stdio",
                "-blockdev", disk.BlockDevice, "-device", "virtio-blk-device,drive=disk",
            ])
        {
            RedirectStandardInput = true,
            RedirectStandardOutput = true,
        })!);
    }

    /// <summary>The next line that begins with a word; what the kernel says is left out. Null: the machine has ended.</summary>
    /// <param name="words">The words.</param>
    /// <exception cref="TimeoutException">It says nothing.</exception>
    public async Task<string?> ReadAsync(params string[] words)
    {
        while (await ReadLineAsync() is { } line)
        {
            _console.AppendLine(line.TrimEnd('\r'));
            if (words.Any(word => line.StartsWith(word, StringComparison.Ordinal)))
            {
                return line.TrimEnd('\r');
            }
        }

        return null;
    }

    /// <summary>SIGKILL for QEMU.</summary>
    public void Kill() => _qemu.Kill();

    /// <summary>Waits for QEMU's end.</summary>
    public Task EndedAsync() => _qemu.WaitForExitAsync(TestContext.Current.CancellationToken).WaitAsync(LineLimit, TestContext.Current.CancellationToken);

    public void Dispose()
    {
        _qemu.Kill(); // no error when it has ended
        _qemu.WaitForExit();
        _qemu.Dispose();
    }

    private async Task<string?> ReadLineAsync()
    {
        try
        {
            return await _qemu.StandardOutput.ReadLineAsync(TestContext.Current.CancellationToken).AsTask().WaitAsync(LineLimit, TestContext.Current.CancellationToken);
        }
        catch (TimeoutException)
        {
            throw new TimeoutException($"The machine has said nothing for {LineLimit.TotalSeconds} s. What it had said:\n{Console}");
        }
    }

    // ldd(1): a line of each, NAME => PATH (ADDRESS), or PATH (ADDRESS) of the loader.
    private static async Task<IEnumerable<string>> LibrariesAsync(string program, CancellationToken cancellationToken)
    {
        using var ldd = Process.Start(new ProcessStartInfo("ldd", [program]) { RedirectStandardOutput = true })!;
        string output = await ldd.StandardOutput.ReadToEndAsync(cancellationToken);
        await ldd.WaitForExitAsync(cancellationToken);
        return LibraryPath().Matches(output).Select(match => match.Groups[1].Value);
    }

    [GeneratedRegex(@"(/\S+) \(0x")]
    private static partial Regex LibraryPath();
}
