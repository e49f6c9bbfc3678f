using System.Collections.Immutable;

namespace Dh.Images;

/// <summary>
/// Where the commands run that handle a root disk's tree: as root in their own mount and process namespaces. So no mount of theirs reaches the
/// host or outlives them, and killing the first kills all. For a user who is not root it is a user namespace besides: the user's own files
/// are root's there, and the other owners are subordinate ids (subuid(5)).
/// </summary>
internal sealed class BuildNamespace
{
    private static readonly ImmutableArray<string> Own = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];

    private readonly ImmutableArray<string> _prefix;

    private BuildNamespace(ImmutableArray<string> prefix) => _prefix = prefix;

    /// <summary>Finds out what this host allows.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: not root, and no user namespace to be had.</exception>
    public static async Task<BuildNamespace> OpenAsync(CancellationToken cancellationToken)
    {
        bool root = Environment.IsPrivilegedProcess;
        if (!root)
        {
            BuildCommand.Locate("newuidmap");
        }

        ImmutableArray<string> prefix = [BuildCommand.Locate("unshare"), .. root ? Own : ["--map-root-user", "--map-auto", .. Own], "--"];
        try
        {
            await (BuildCommand.Of("true") with { Prefix = prefix, Timeout = TimeSpan.FromSeconds(30) }).RunAsync(cancellationToken);
            return new BuildNamespace(prefix);
        }
        catch (BuildCommandException) when (root)
        {
            // Root in a container that may not unshare: mmdebstrap makes do without mounts, or says what it misses.
            return new BuildNamespace([]);
        }
        catch (BuildCommandException error)
        {
            throw new DhException(
                DhErrorReason.Host,
                $"An image is built as root or in a user namespace, and this host gives user {Environment.UserName} none: add the user to " +
                $"/etc/subuid and /etc/subgid, allow user namespaces (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone, " +
                $"kernel.apparmor_restrict_unprivileged_userns), or run `dh vm prepare` as root.\n{BuildCommandException.Indent(error.LastLines)}",
                error);
        }
    }

    /// <summary>The command inside.</summary>
    public BuildCommand Enter(BuildCommand command) => command with { Prefix = _prefix };

    /// <summary>A command of the tree itself, with the tree as its root directory.</summary>
    public BuildCommand EnterTree(string tree, string program, params ReadOnlySpan<string> arguments) =>
        Enter(BuildCommand.Of("chroot", [tree, program, .. arguments])).With("HOME", "/root").With("LC_ALL", "C.UTF-8");

    /// <summary>Removes a directory with all that commands inside made in it, whoever owns it. Does not cross into other file systems.</summary>
    public async Task RemoveAsync(string directory)
    {
        if (!Directory.Exists(directory))
        {
            return;
        }

        // Without namespaces a killed mmdebstrap leaves its mounts behind.
        foreach (string mount in MountsBelow(directory, await File.ReadAllLinesAsync("/proc/self/mountinfo")))
        {
            await BuildCommand.Of("umount", "--lazy", mount).RunAsync(CancellationToken.None);
        }

        await Enter(BuildCommand.Of("rm", "--recursive", "--force", "--one-file-system", "--", directory)).RunAsync(CancellationToken.None);
    }

    /// <summary>The mount points below a directory, the innermost first (proc_pid_mountinfo(5): field 5, with octal escapes).</summary>
    internal static IReadOnlyList<string> MountsBelow(string directory, IEnumerable<string> mountInfo)
    {
        string prefix = Path.TrimEndingDirectorySeparator(Path.GetFullPath(directory)) + "/";
        return
        [
            .. mountInfo.Select(line => line.Split(' ')).Where(fields => fields.Length > 4)
                .Select(fields => fields[4].Replace(@"\040", " ", StringComparison.Ordinal).Replace(@"\011", "\t", StringComparison.Ordinal)
                    .Replace(@"\012", "\n", StringComparison.Ordinal).Replace(@"\134", @"\", StringComparison.Ordinal))
                .Where(point => point.StartsWith(prefix, StringComparison.Ordinal))
                .Reverse(),
        ];
    }
}
