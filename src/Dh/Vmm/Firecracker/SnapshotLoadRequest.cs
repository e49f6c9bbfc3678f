namespace Dh.Vmm.Firecracker;

/// <summary>Where Firecracker gets the memory of a snapshot from.</summary>
internal enum SnapshotMemoryType
{
    /// <summary>A private mapping of the memory file.</summary>
    File,

    /// <summary>A page server on a unix socket.</summary>
    Uffd,
}

/// <summary><c>mem_backend</c> of a load, since 1.1.</summary>
internal sealed record SnapshotMemoryBackend(string BackendType, string BackendPath);

/// <summary><c>vsock_override</c> of a load.</summary>
internal sealed record VsockOverride(string UdsPath);

/// <summary><c>network_overrides</c> of a load.</summary>
internal sealed record NetworkOverride(string IfaceId, string HostDevName);

/// <summary>
/// <c>PUT /snapshot/load</c>. An unknown field is answered with 400, so what a version does not know is refused here. Firecracker takes exactly
/// one of <c>mem_backend</c> and <c>mem_file_path</c>: there is no way to make a request with both, or with none.
/// </summary>
internal sealed record SnapshotLoadRequest
{
    private static readonly Version MemoryBackendSince = new(1, 1, 0);

    private SnapshotLoadRequest(string snapshotPath, SnapshotMemoryBackend? backend, string? memoryFile, bool resume)
    {
        SnapshotPath = snapshotPath;
        MemBackend = backend;
        MemFilePath = memoryFile;
        ResumeVm = resume;
    }

    /// <summary>The state file.</summary>
    public string SnapshotPath { get; }

    /// <summary>Where memory comes from; null before 1.1.</summary>
    public SnapshotMemoryBackend? MemBackend { get; }

    /// <summary>The memory file, before 1.1.</summary>
    public string? MemFilePath { get; }

    /// <summary>Whether the machine runs at once.</summary>
    public bool ResumeVm { get; }

    /// <summary>Other devices of the host for the guest's network interfaces; since 1.12.</summary>
    public IReadOnlyList<NetworkOverride>? NetworkOverrides { get; init; }

    /// <summary>Whether pages that the guest writes are tracked; since 1.13.</summary>
    public bool? TrackDirtyPages { get; init; }

    /// <summary>Another path for the vsock device's socket; since 1.16.1, because 1.16.0 takes it and makes the guest unreachable.</summary>
    public VsockOverride? VsockOverride { get; init; }

    /// <summary>Whether the guest's wall clock is set from the host's; since 1.16. Fatal when the creating host had no KVM master clock.</summary>
    public bool? ClockRealtime { get; init; }

    /// <summary><c>Snapshot</c>, <c>None</c>, <c>Transparent</c> or <c>2M</c>, which needs Uffd; since 1.17.</summary>
    public string? HugePages { get; init; }

    /// <summary>Whether a version can have its memory from a page server.</summary>
    public static bool KnowsUffd(Version version) => version >= MemoryBackendSince;

    /// <summary>A request that a version understands, without optional fields.</summary>
    /// <param name="version">Firecracker's.</param>
    /// <param name="snapshotPath">The state file.</param>
    /// <param name="type">Where memory comes from.</param>
    /// <param name="memoryPath">The memory file, or the page server's socket.</param>
    /// <param name="resume">Whether the machine runs at once.</param>
    /// <exception cref="DhException">The version knows no page server.</exception>
    public static SnapshotLoadRequest Of(Version version, string snapshotPath, SnapshotMemoryType type, string memoryPath, bool resume)
    {
        if (KnowsUffd(version))
        {
            return new SnapshotLoadRequest(snapshotPath, new SnapshotMemoryBackend(type.ToString(), memoryPath), null, resume);
        }

        return type == SnapshotMemoryType.File
            ? new SnapshotLoadRequest(snapshotPath, null, memoryPath, resume)
            : throw new DhException(DhErrorReason.Vmm, $"Firecracker {version} cannot have its memory from a page server: that takes {MemoryBackendSince} or newer.");
    }

    /// <summary>Refuses fields that a version does not know, and a path that nobody could connect to.</summary>
    /// <param name="version">Firecracker's.</param>
    /// <exception cref="DhException">The message names the field and the version that it takes.</exception>
    public SnapshotLoadRequest Checked(Version version)
    {
        (string Field, bool IsSet, Version Since)[] optional =
        [
            ("network_overrides", NetworkOverrides is not null, new(1, 12, 0)),
            ("track_dirty_pages", TrackDirtyPages is not null, new(1, 13, 0)),
            ("vsock_override", VsockOverride is not null, new(1, 16, 1)),
            ("clock_realtime", ClockRealtime is not null, new(1, 16, 0)),
            ("huge_pages", HugePages is not null, new(1, 17, 0)),
        ];
        foreach (var (field, isSet, since) in optional)
        {
            if (isSet && version < since)
            {
                throw new DhException(DhErrorReason.Vmm, $"Firecracker {version} does not know `{field}` of PUT /snapshot/load: that takes {since} or newer.");
            }
        }

        if (VsockOverride is { UdsPath.Length: 0 })
        {
            throw new DhException(DhErrorReason.Vmm, "`vsock_override` with an empty path makes a guest that nobody can connect to.");
        }

        return HugePages is not "2M" || MemBackend is { BackendType: nameof(SnapshotMemoryType.Uffd) }
            ? this
            : throw new DhException(DhErrorReason.Vmm, "`huge_pages` of 2M take memory from a page server.");
    }
}
