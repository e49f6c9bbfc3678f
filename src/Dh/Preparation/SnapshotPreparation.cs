using System.Diagnostics;
using System.Globalization;
using System.Security.Cryptography;
using Dh.Guest;
using Dh.Images;
using Dh.Linux;
using Dh.Paging;
using Dh.Sandboxes;
using Dh.Snapshots;
using Dh.Vmm;

namespace Dh.Preparation;

/// <summary>
/// Makes snapshots: image -> boot -> ready -> pause -> device state -> holes -> a restore with each memory backend that runs code and a timer
/// -> published. All of it happens beside the snapshots; a crash, a full disk or Ctrl-C leaves the old one in use and nothing half-made.
/// </summary>
public static class SnapshotPreparation
{
    private const int BootAttempts = 3;

    // What an engine says that could not be started (guest/execution.py, `log`): it would not the next time either.
    private const string EngineFailure = "dh engine: ";

    private const long FullDiskBytes = 1 << 20;

    // What a restored machine must be able to do before anybody gets it: run code, and have a clock that ticks and interrupts.
    private const string VerificationCode = "import time; t = time.monotonic(); time.sleep(0.05); print(6 * 7, time.monotonic() - t >= 0.05)";
    private const string VerificationOutput = "42 True\n";

    private static readonly TimeSpan BootTimeLimit = TimeSpan.FromSeconds(90);

    // A JVM, its server and the warm-up of its query compiler take a minute and more under TCG.
    private static readonly TimeSpan JvmBootTimeLimit = TimeSpan.FromMinutes(10);
    private static readonly TimeSpan StepTimeLimit = TimeSpan.FromSeconds(60);

    /// <summary>Prepares a snapshot and makes it the current one of its template and version.</summary>
    /// <param name="options">What and how.</param>
    /// <param name="progress">Gets each step; null for nobody.</param>
    /// <param name="cancellationToken">Gives up; the old snapshot stays in use.</param>
    /// <returns>The snapshot; an existing one of the same image and machine unless <see cref="PreparationOptions.Force"/> is set.</returns>
    /// <exception cref="DhException">A step failed; nothing was changed.</exception>
    public static async Task<Snapshot> PrepareAsync(PreparationOptions options, IProgress<PreparationProgress>? progress = null, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(options);
        JvmHeap.Require(options.Template.JvmArguments, options.MemoryMib ?? options.Template.MemoryMib);
        if (options.Compress && UserfaultfdRefusal() is { } refusal)
        {
            throw new DhException(
                DhErrorReason.Host, $"A compressed snapshot needs a userfaultfd: {refusal.Message}. Give this user access to {Userfaultfd.DevicePath}, or prepare without --compress.", refusal);
        }

        try
        {
            var wanted = VmmSelection.Wanted(await VmmCandidate.FindAllAsync(options.Programs, options.Home, cancellationToken).ConfigureAwait(false), options);
            var store = new SnapshotStore(options.Home);
            using var preparing = await store.LockPreparationAsync(
                () => Report("waiting", "another preparation is under way"), cancellationToken).ConfigureAwait(false);
            store.RemoveDeadDrafts();
            var builder = Builder(options);
            var image = await builder.BuildAsync(options.Template, progress is null ? null : new ImageSteps(progress), cancellationToken).ConfigureAwait(false);
            var (driver, machine) = await ChooseMachineAsync(options, wanted, builder, image, Report, cancellationToken).ConfigureAwait(false);
            if (!options.Force && store.FindNewest(options.Template.Name) is { } existing && existing.IsCompressed == options.Compress
                && await FitsAsync(existing, image, driver, machine, options, cancellationToken).ConfigureAwait(false))
            {
                Report("up to date", existing.Directory);
                return existing;
            }

            string id = $"{DateTimeOffset.UtcNow.ToString("yyyyMMdd'T'HHmmss", CultureInfo.InvariantCulture)}-{Convert.ToHexStringLower(RandomNumberGenerator.GetBytes(4))}";
            string draft = store.CreateDraft(id);
            try
            {
                var manifest = await MakeAsync(options, driver, image, machine, id, draft, Report, cancellationToken).ConfigureAwait(false);
                await VerifyAsync(draft, options, Report, cancellationToken).ConfigureAwait(false);
                await RecordAsync(draft, options, progress, cancellationToken).ConfigureAwait(false);
                if (options.Compress)
                {
                    File.Delete(Path.Combine(draft, Snapshot.MemoryName));
                }

                var snapshot = store.Publish(draft, manifest);
                Report("published", snapshot.Directory);
                return snapshot;
            }
            finally
            {
                if (Directory.Exists(draft))
                {
                    Directory.Delete(draft, recursive: true);
                }
            }
        }
        catch (IOException e)
        {
            long free = new DriveInfo(options.Home.Path).AvailableFreeSpace;
            throw new DhException(
                DhErrorReason.Host, $"The snapshot could not be written in {options.Home.Path} ({free >> 20} MiB free): {e.Message.TrimEnd('.')}. The old snapshot, if there is one, stays in use. Make room there, or set DH_HOME to another directory.", e);
        }

        void Report(string step, string? detail) => progress?.Report(new PreparationProgress(step, detail, null));
    }

    private static ImageBuilder Builder(PreparationOptions options) => new(new ImageBuildOptions
    {
        ImagesDirectory = DhHome.EnsurePrivate(options.Home.ImagesDirectory),
        GuestDirectory = options.Installation.GuestDirectory,
        Wheelhouse = options.Wheelhouse,
        ExtraRequirements = options.PipPackages,
        Mirror = options.Mirror,
    });

    private static async Task<(IVmmDriver Driver, MachineDescription Machine)> ChooseMachineAsync(
        PreparationOptions options, IReadOnlyList<VmmCandidate> wanted, ImageBuilder builder, Image image, Action<string, string?> report, CancellationToken cancellationToken)
    {
        string cache = DhHome.EnsurePrivate(options.Home.CacheDirectory);
        async Task<string> KernelOf(IVmmDriver driver) => driver.BootsElfKernel ? await builder.UnpackKernelAsync(image, cancellationToken).ConfigureAwait(false) : image.KernelPath;
        var (driver, accelerator) = await VmmSelection.TakeAsync(
            wanted,
            options,
            async candidate => await KvmProbe.ProbeAsync(
                candidate, await KernelOf(candidate).ConfigureAwait(false), image.InitrdPath, cache, options.Installation, cancellationToken).ConfigureAwait(false),
            report).ConfigureAwait(false);
        return (driver, driver.Complete(new MachineDescription
        {
            Accelerator = accelerator,
            MemoryMib = options.MemoryMib ?? options.Template.MemoryMib,
            Cpus = options.Cpus,
            Balloon = options.Balloon,
            KernelPath = await KernelOf(driver).ConfigureAwait(false),
            InitrdPath = image.InitrdPath,
            RootDiskPath = image.RootDiskPath,
            TscKhz = await TscFrequency.GetKhzAsync(options.Installation, cache, cancellationToken).ConfigureAwait(false),
        }));
    }

    /// <summary>Whether a snapshot is what would be made, and can be restored here.</summary>
    private static async Task<bool> FitsAsync(
        Snapshot snapshot, Image image, IVmmDriver driver, MachineDescription machine, PreparationOptions options, CancellationToken cancellationToken)
    {
        var manifest = snapshot.Manifest;
        return manifest.Vmm == driver.Name && manifest.ImageHash == image.Hash
            && manifest.MemoryMib == machine.MemoryMib && manifest.Cpus == machine.Cpus && manifest.Balloon == machine.Balloon && manifest.Accelerator == machine.Accelerator
            && (await RestoreHost.OfAsync(snapshot, driver, options.Home, options.Installation, cancellationToken).ConfigureAwait(false)).Refuses(manifest) is null;
    }

    private static async Task<SnapshotManifest> MakeAsync(
        PreparationOptions options, IVmmDriver driver, Image image, MachineDescription source, string id, string draft, Action<string, string?> report, CancellationToken cancellationToken)
    {
        report("copying", "kernel, initrd, root disk");
        var machine = source with
        {
            KernelPath = Path.Combine(draft, Snapshot.KernelName),
            InitrdPath = Path.Combine(draft, Snapshot.InitrdName),
            RootDiskPath = Path.Combine(draft, Snapshot.RootDiskName),
        };
        File.Copy(source.KernelPath, machine.KernelPath);
        File.Copy(source.InitrdPath, machine.InitrdPath);
        File.Copy(source.RootDiskPath, machine.RootDiskPath);

        string memory = Path.Combine(draft, Snapshot.MemoryName), state = Path.Combine(draft, Snapshot.StateName);
        double bootSeconds = await BootAndSaveAsync(options, driver, machine, memory, state, report, cancellationToken).ConfigureAwait(false);
        report("punching holes", null);
        long dataBytes = ZeroPages.Punch(memory, cancellationToken);

        string memoryName = Snapshot.MemoryName;
        if (options.Compress)
        {
            report("compressing", null);
            memoryName = Snapshot.CompressedMemoryName;
            Lz4MemoryWriter.Write(memory, Path.Combine(draft, memoryName), cancellationToken);
        }

        report("hashing", null);
        var files = SnapshotDraft.FinishFiles(draft, memoryName, cancellationToken);
        var manifest = new SnapshotManifest
        {
            SchemaVersion = SnapshotManifest.CurrentSchemaVersion,
            Id = id,
            Template = options.Template.Name,
            ImageHash = image.Hash,
            Version = image.Version,
            Vmm = driver.Name,
            VmmVersion = driver.Version.ToString(),
            SnapshotVersion = driver.SnapshotVersion?.ToString(),
            MachineHash = driver.MachineHash(machine),
            Accelerator = machine.Accelerator,
            MemoryMib = machine.MemoryMib,
            Cpus = machine.Cpus,
            TscKhz = machine.TscKhz,
            Balloon = machine.Balloon,
            DataBytes = dataBytes,
            BootSeconds = Math.Round(bootSeconds, 2),
            CreatedAt = DateTimeOffset.UtcNow,
            RunnerProtocol = GuestSession.ProtocolVersion,
            DhVersion = BuildVersion.Text,
            Files = files,
        };
        SnapshotDraft.WriteManifest(draft, manifest);
        return manifest;
    }

    private static async Task<double> BootAndSaveAsync(
        PreparationOptions options, IVmmDriver driver, MachineDescription machine, string memory, string state, Action<string, string?> report, CancellationToken cancellationToken)
    {
        for (int attempt = 1; ; attempt++)
        {
            report("booting", attempt == 1 ? $"{machine.MemoryMib} MiB, {machine.Cpus} CPUs, {machine.Accelerator}" : $"attempt {attempt} of {BootAttempts}");
            try
            {
                _ = StaleRunDirectories.Remove(DhHome.EnsurePrivate(options.Home.RunDirectory));
                await using var vmm = await driver.BootAsync(
                    machine,
                    memory,
                    new VmmStartOptions
                    {
                        RunDirectory = Path.Combine(options.Home.RunDirectory, Guid.NewGuid().ToString("N")),
                        Installation = options.Installation,
                        StepTimeLimit = StepTimeLimit,
                    },
                    cancellationToken).ConfigureAwait(false);
                try
                {
                    var timeLimit = options.Template.Engine == "deephaven" ? JvmBootTimeLimit : BootTimeLimit;
                    await vmm.ResumeAsync(cancellationToken).ConfigureAwait(false);
                    using var session = new GuestSession(new SocketTransport(await vmm.ConnectGuestAsync(timeLimit, cancellationToken).ConfigureAwait(false)));
                    await session.WaitReadyAsync(timeLimit, cancellationToken).ConfigureAwait(false);
                }
                catch (DhException e) when (e.Reason == DhErrorReason.Guest)
                {
                    throw await ExplainAsync(vmm, e).ConfigureAwait(false);
                }

                double bootSeconds = Stopwatch.GetElapsedTime(vmm.StartedAt).TotalSeconds;
                report("saving", null);
                await vmm.PauseAsync(cancellationToken).ConfigureAwait(false);
                await vmm.SaveAsync(state, cancellationToken).ConfigureAwait(false);
                return bootSeconds;
            }
            catch (DhException e) when (e.Reason == DhErrorReason.Vmm && new DriveInfo(memory).AvailableFreeSpace < FullDiskBytes)
            {
                // A page of the memory file that the disk has no room for is a SIGBUS for the VMM, which cannot say so (mmap(2)).
                throw new IOException("No space left on device for guest memory", e);
            }
            catch (DhException e) when (attempt < BootAttempts && e.Reason == DhErrorReason.Vmm && !e.Message.Contains(EngineFailure, StringComparison.Ordinal))
            {
                report("booting", $"attempt {attempt} failed: {e.Message}");
                File.Delete(memory);
                File.Delete(state);
            }
        }
    }

    private static async Task RecordAsync(string draft, PreparationOptions options, IProgress<PreparationProgress>? progress, CancellationToken cancellationToken)
    {
        if (options.Template.RecordCode.Length == 0)
        {
            return;
        }

        if (UserfaultfdRefusal() is { } refusal)
        {
            progress?.Report(new PreparationProgress("notice", $"no working set is recorded without a userfaultfd: {refusal.Message}", null));
            return;
        }

        await WorkingSetRecording.RecordAsync(
            Snapshot.Open(draft),
            WorkingSetRecording.RunsOf(options.Template),
            new SandboxOptions { Home = options.Home, Installation = options.Installation, Programs = options.Programs },
            progress,
            cancellationToken).ConfigureAwait(false);
    }

    /// <summary>Why this host grants no userfaultfd; null when it does.</summary>
    private static LinuxException? UserfaultfdRefusal()
    {
        try
        {
            Userfaultfd.OpenDevice().Dispose();
            return null;
        }
        catch (LinuxException e)
        {
            return e;
        }
    }

    private static async Task<DhException> ExplainAsync(IVmm vmm, DhException e)
    {
        await Task.WhenAny(vmm.Exited, Task.Delay(TimeSpan.FromSeconds(1))).ConfigureAwait(false);
        string end = vmm.Exited.IsCompletedSuccessfully ? $" ({await vmm.Exited.ConfigureAwait(false)})" : "";
        string words = vmm.LastWords();
        return new DhException(DhErrorReason.Vmm, $"The image did not boot: {e.Message}{end}{(words.Length > 0 ? $" The machine's last words:\n{words}" : "")}", e);
    }

    private static async Task VerifyAsync(string draft, PreparationOptions options, Action<string, string?> report, CancellationToken cancellationToken)
    {
        var snapshot = Snapshot.Open(draft);
        bool uffd = true;
        foreach (var policy in (MemoryPolicy[])(snapshot.IsCompressed ? [MemoryPolicy.Eager] : [MemoryPolicy.Eager, MemoryPolicy.File]))
        {
            report("verifying", $"restore with memory policy {policy.ToString().ToLowerInvariant()}");
            var sandboxOptions = new SandboxOptions { MemoryPolicy = policy == MemoryPolicy.Eager ? null : policy, Home = options.Home, Installation = options.Installation, Programs = options.Programs };
            await using var sandbox = await Sandbox.RestoreAsync(snapshot, sandboxOptions, cancellationToken).ConfigureAwait(false);
            if (sandbox.Notice is not null && uffd)
            {
                uffd = false;
                report("notice", sandbox.Notice);
            }

            var output = new CapturedText();
            var result = await sandbox.ExecuteAsync(
                new ExecutionRequest { Source = VerificationCode, Timeout = TimeSpan.FromSeconds(30) }, output, cancellationToken).ConfigureAwait(false);
            if (result.ExitCode != 0 || output.Text != VerificationOutput)
            {
                throw new DhException(
                    DhErrorReason.Snapshot,
                    $"The new snapshot restored with policy {policy} but its code ended with exit code {result.ExitCode} and printed \"{output.Text}\" instead of \"{VerificationOutput}\". It is not published.");
            }
        }
    }

    /// <summary>Passes the image builder's steps on.</summary>
    private sealed class ImageSteps(IProgress<PreparationProgress> progress) : IProgress<ImageProgress>
    {
        public void Report(ImageProgress value) => progress.Report(new PreparationProgress(value.Step, value.Detail, value.Fraction));
    }
}
