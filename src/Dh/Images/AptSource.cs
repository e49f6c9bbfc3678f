namespace Dh.Images;

/// <summary>One line of sources.list(5).</summary>
/// <param name="Uri">The archive.</param>
/// <param name="Release">Its release, as apt knows it: <c>bookworm-security</c>.</param>
/// <param name="Component"><c>main</c>.</param>
/// <param name="SignedBy">The keyring that must have signed the Release file.</param>
internal sealed record AptSource(string Uri, string Release, string Component, string SignedBy)
{
    /// <summary>Debian's own keyring (package debian-archive-keyring).</summary>
    public const string DebianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg";

    /// <summary>Debian's name of the one architecture that there is.</summary>
    public const string Architecture = "amd64";

    // apt 2.6 knows no SIGNED_BY here and leaves it as it stands.
    private const string Format = "$(REPO_URI)|$(RELEASE)|$(CODENAME)|$(COMPONENT)|$(ARCHITECTURE)|$(SIGNED_BY)";

    /// <summary>The line. apt refuses what <see cref="SignedBy"/> did not sign.</summary>
    public override string ToString() => $"deb [arch={Architecture} signed-by={SignedBy}] {Uri} {Release} {Component}";

    /// <summary>The sources of a suite that this host's apt is configured with.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: there are none, or no list was ever fetched.</exception>
    public static async Task<IReadOnlyList<AptSource>> OfHostAsync(string suite, CancellationToken cancellationToken)
    {
        string targets = await BuildCommand.Of("apt-get", "indextargets", "--format", Format, "Created-By: Packages").RunAsync(cancellationToken);
        return ParseTargets(targets, suite);
    }

    /// <summary>The sources of a suite at a given mirror: the release, its updates and, where the mirror's name tells it, its security updates.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Usage"/>: this is no mirror.</exception>
    public static IReadOnlyList<AptSource> OfMirror(string mirror, string suite)
    {
        if (!System.Uri.TryCreate(mirror, UriKind.Absolute, out var uri) || uri.Scheme is not ("http" or "https" or "file") || mirror.Any(char.IsWhiteSpace))
        {
            throw new DhException(DhErrorReason.Usage, $"'{mirror}' is no mirror: it is the http, https or file URI of a Debian archive, the directory that holds dists/ and pool/.");
        }

        string archive = mirror.TrimEnd('/');
        List<AptSource> sources = [new(archive + "/", suite, "main", DebianKeyring), new(archive + "/", suite + "-updates", "main", DebianKeyring)];
        if (archive.EndsWith("/debian", StringComparison.Ordinal))
        {
            sources.Add(new(archive + "-security/", suite + "-security", "main", DebianKeyring));
        }

        return sources;
    }

    /// <summary>Reads what <c>apt-get indextargets</c> printed.</summary>
    internal static IReadOnlyList<AptSource> ParseTargets(string targets, string suite)
    {
        string[][] rows = [.. targets.Split('\n', StringSplitOptions.RemoveEmptyEntries).Select(line => line.Split('|')).Where(fields => fields.Length == 6)];
        if (rows.Length == 0)
        {
            throw new DhException(DhErrorReason.Host, "This host's apt has no package lists: run `apt-get update`, or name a mirror with --mirror.");
        }

        // A source may be written as "stable"; its codename says what that is.
        string[] wanted = [suite, suite + "-updates", suite + "-security"];
        string[][] chosen = [.. rows.Where(row => (wanted.Contains(row[1]) || wanted.Contains(row[2])) && row[4] == Architecture)];
        return chosen.Any(row => row[1] == suite || row[2] == suite)
            ? [.. chosen.Select(row => new AptSource(row[0], row[1], row[3], row[5].StartsWith('/') ? row[5] : DebianKeyring)).Distinct()]
            : throw new DhException(
                DhErrorReason.Host,
                $"This host's apt has no source of Debian {suite}: add one to /etc/apt/sources.list.d and run `apt-get update`, or name a mirror with --mirror. " +
                $"It has: {string.Join(", ", rows.Select(row => row[1]).Distinct())}.");
    }
}
