using System.Text;

namespace Dh.Images;

/// <summary>
/// apt with a state of its own: it looks up and downloads packages of a suite, whatever the host's release is, and changes nothing of the host's
/// apt. Every package is checked against the signed Release file.
/// </summary>
internal sealed class AptArchive
{
    private static readonly TimeSpan DownloadLimit = TimeSpan.FromMinutes(15);

    // What the host's administrator set about reaching mirrors; nothing about trusting them.
    private static readonly string[] Transport =
        ["Acquire::http", "Acquire::https", "Acquire::Retries", "Acquire::ForceIPv4", "Acquire::ForceIPv6", "Acquire::Check-Valid-Until", "Acquire::Check-Date"];

    private readonly string _directory;

    private AptArchive(string directory) => _directory = directory;

    /// <summary>The sources.list(5) file.</summary>
    public string SourcesPath => Path.Combine(_directory, "sources.list");

    /// <summary>The host's settings about proxies and the like, in apt.conf(5) form.</summary>
    public string TransportPath => Path.Combine(_directory, "transport.conf");

    private string ConfigurationPath => Path.Combine(_directory, "apt.conf");

    /// <summary>Sets one up.</summary>
    /// <param name="directory">An empty directory for its state.</param>
    /// <param name="sources">Where packages come from.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Host"/>: a keyring is missing.</exception>
    public static async Task<AptArchive> CreateAsync(string directory, IReadOnlyList<AptSource> sources, CancellationToken cancellationToken)
    {
        if (sources.Select(source => source.SignedBy).FirstOrDefault(keyring => !File.Exists(keyring)) is { } missing)
        {
            throw new DhException(DhErrorReason.Host, $"The keyring {missing} is missing: run `make setup` or `apt-get install debian-archive-keyring`.");
        }

        foreach (string part in (string[])["lists/partial", "cache/archives/partial"])
        {
            Directory.CreateDirectory(Path.Combine(directory, part));
        }

        var archive = new AptArchive(directory);
        await File.WriteAllTextAsync(Path.Combine(directory, "status"), "", cancellationToken);
        await File.WriteAllLinesAsync(archive.SourcesPath, sources.Select(source => source.ToString()), cancellationToken);
        string host = await BuildCommand.Of("apt-config", "dump").RunAsync(cancellationToken);
        await File.WriteAllTextAsync(archive.TransportPath, SelectTransport(host), cancellationToken);
        await File.WriteAllTextAsync(archive.ConfigurationPath, Configuration(directory) + SelectTransport(host), cancellationToken);
        return archive;
    }

    /// <summary>Fetches the package lists.</summary>
    public Task UpdateAsync(CancellationToken cancellationToken) => Apt("apt-get", "update", "--quiet", "--error-on=any").RunAsync(cancellationToken);

    /// <summary>The newest package of a name: its control fields.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: the suite has no such package.</exception>
    public async Task<IReadOnlyDictionary<string, string>> ShowAsync(string package, CancellationToken cancellationToken) =>
        ParseControl(await Apt("apt-cache", "show", "--no-all-versions", package).RunAsync(cancellationToken));

    /// <summary>Finds out what installing packages into an empty system comes to, in a second and without doing it.</summary>
    /// <param name="packages">Their names.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    /// <returns>The names of all that would be installed.</returns>
    /// <exception cref="BuildCommandException">One does not exist, or two do not go together; apt's lines say which.</exception>
    public async Task<IReadOnlySet<string>> SimulateInstallAsync(IEnumerable<string> packages, CancellationToken cancellationToken) =>
        ParseSimulation(await Apt("apt-get", ["install", "--simulate", "--quiet", "--no-install-recommends", .. packages]).RunAsync(cancellationToken));

    /// <summary>Downloads a package and unpacks it, without running anything of it.</summary>
    /// <param name="package">Its name.</param>
    /// <param name="target">The directory to unpack into.</param>
    /// <param name="cancellationToken">Ends the work.</param>
    public async Task UnpackAsync(string package, string target, CancellationToken cancellationToken)
    {
        string downloads = Directory.CreateDirectory(Path.Combine(_directory, "download-" + package)).FullName;
        await (Apt("apt-get", "download", "--quiet", package) with { WorkingDirectory = downloads }).RunAsync(cancellationToken);
        string file = Directory.EnumerateFiles(downloads, "*.deb").Single();
        await BuildCommand.Of("dpkg-deb", "--extract", file, target).RunAsync(cancellationToken);
        File.Delete(file);
    }

    /// <summary>The first paragraph of Debian control data; continuation lines are dropped.</summary>
    internal static IReadOnlyDictionary<string, string> ParseControl(string text)
    {
        var fields = new Dictionary<string, string>(StringComparer.OrdinalIgnoreCase);
        foreach (string line in text.Split('\n').TakeWhile(line => line.Length > 0))
        {
            int colon = line.IndexOf(':', StringComparison.Ordinal);
            if (colon > 0 && !char.IsWhiteSpace(line[0]))
            {
                fields[line[..colon]] = line[(colon + 1)..].Trim();
            }
        }

        return fields;
    }

    /// <summary>The packages of apt-get's <c>Inst NAME (VERSION ...)</c> lines.</summary>
    internal static IReadOnlySet<string> ParseSimulation(string output) => output.Split('\n')
        .Select(line => line.Split(' ')).Where(words => words is ["Inst", _, ..]).Select(words => words[1]).ToHashSet(StringComparer.Ordinal);

    /// <summary>The lines of <c>apt-config dump</c> that say how mirrors are reached.</summary>
    internal static string SelectTransport(string dump)
    {
        var selected = new StringBuilder();
        foreach (string line in dump.Split('\n'))
        {
            string key = line.Split(' ')[0];
            if (Transport.Any(name => key == name || key.StartsWith(name + "::", StringComparison.Ordinal)))
            {
                selected.Append(line).Append('\n');
            }
        }

        return selected.ToString();
    }

    // Dir::Etc::parts and ::main: APT_CONFIG is read first, and these two keep the host's hooks (APT::Update::Post-Invoke) out.
    // APT::Sandbox::User: the directory is below DH_HOME, which apt's own user need not be able to enter.
    private static string Configuration(string directory) => $"""
        Dir::Etc::main "/dev/null";
        Dir::Etc::parts "/dev/null";
        Dir::Etc::sourcelist "{directory}/sources.list";
        Dir::Etc::sourceparts "/dev/null";
        Dir::State "{directory}";
        Dir::State::lists "{directory}/lists";
        Dir::State::status "{directory}/status";
        Dir::Cache "{directory}/cache";
        APT::Architecture "{AptSource.Architecture}";
        APT::Architectures "{AptSource.Architecture}";
        APT::Sandbox::User "root";
        Acquire::Languages "none";

        """;

    private BuildCommand Apt(string program, params ReadOnlySpan<string> arguments) =>
        BuildCommand.Of(program, arguments).With("APT_CONFIG", ConfigurationPath).With("TMPDIR", _directory) with { Timeout = DownloadLimit };
}
