namespace Dh.Images;

/// <summary>
/// What an image is built from: Debian packages, Python packages, an engine and the code that warms it. Templates are TOML files;
/// <c>templates/python.toml</c> explains every key.
/// </summary>
public sealed record Template
{
    /// <summary>The engines that this build knows.</summary>
    public static IReadOnlyList<string> Engines { get; } = ["python", "deephaven"];

    /// <summary>What image and snapshot directories are named after: 1 to 40 of <c>a-z 0-9 -</c>, a letter or digit first.</summary>
    public required string Name { get; init; }

    /// <summary>One line for people; may be empty.</summary>
    public string Description { get; init; } = "";

    /// <summary>What runs the code in the guest: one of <see cref="Engines"/>.</summary>
    public string Engine { get; init; } = "python";

    /// <summary>The version that the template fixes; null when it is the interpreter's, which the built image tells.</summary>
    public string? Version { get; init; }

    /// <summary>The Debian release that the packages and the kernel come from, by code name.</summary>
    public string Suite { get; init; } = "bookworm";

    /// <summary>Debian packages of the root disk, beside those that Debian marks essential.</summary>
    public required IReadOnlyList<string> Packages { get; init; }

    /// <summary>Python requirements in pip's notation; <c>{version}</c> in them stands for <see cref="Version"/>.</summary>
    public IReadOnlyList<string> Requirements { get; init; } = [];

    /// <summary>Arguments for the JVM of the engine <c>deephaven</c>, besides those that Deephaven passes by itself.</summary>
    public IReadOnlyList<string> JvmArguments { get; init; } = [];

    /// <summary>The guest's memory in MiB, 128 to 1,048,576.</summary>
    public int MemoryMib { get; init; } = 512;

    /// <summary>Python code that the engine runs once, before the snapshot is taken; may be empty.</summary>
    public string WarmupCode { get; init; } = "";

    /// <summary>Python code that runs before each run's code, in the same process and with the warm-up's names, once that process is reseeded: it makes
    /// what the warm-up has left behind the clone's own. May be empty.</summary>
    public string RestoreCode { get; init; } = "";

    /// <summary>Python code that stands for what users run, by which the working set is recorded; may be empty.</summary>
    public string RecordCode { get; init; } = "";

    /// <summary>Reads a template from its text.</summary>
    /// <param name="text">TOML 1.1.</param>
    /// <param name="source">What errors call the text: its path.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Image"/>: not TOML, an unknown key, a wrong type, a value out of range, or a
    /// key missing; the message names the line.</exception>
    public static Template Parse(string text, string source)
    {
        ArgumentNullException.ThrowIfNull(text);
        ArgumentNullException.ThrowIfNull(source);
        return TemplateReader.Read(text, source);
    }

    /// <summary>Reads a template from its file.</summary>
    /// <param name="path">The file.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.NotFound"/>: there is no such file, or it cannot be read;
    /// <see cref="DhErrorReason.Image"/>: see <see cref="Parse"/>.</exception>
    public static Template Load(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        try
        {
            return Parse(File.ReadAllText(path), path);
        }
        catch (Exception error) when (error is IOException or UnauthorizedAccessException)
        {
            throw new DhException(DhErrorReason.NotFound, $"The template {path} cannot be read.", error);
        }
    }

    /// <summary>Finds a template by its name among those that come with the program, or by its path.</summary>
    /// <param name="nameOrPath">A name (<c>python</c>), or a path: it holds a <c>/</c> or ends in <c>.toml</c>.</param>
    /// <param name="templatesDirectory">Where the program's templates are.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.NotFound"/>: there is none; the message lists those that there are.
    /// <see cref="DhErrorReason.Image"/>: see <see cref="Parse"/>.</exception>
    public static Template Find(string nameOrPath, string templatesDirectory)
    {
        ArgumentException.ThrowIfNullOrEmpty(nameOrPath);
        ArgumentException.ThrowIfNullOrEmpty(templatesDirectory);
        if (nameOrPath.Contains('/', StringComparison.Ordinal) || nameOrPath.EndsWith(".toml", StringComparison.Ordinal))
        {
            return Load(nameOrPath);
        }

        string path = Path.Combine(templatesDirectory, nameOrPath + ".toml");
        if (File.Exists(path))
        {
            return Load(path);
        }

        string[] known = Directory.Exists(templatesDirectory)
            ? [.. Directory.EnumerateFiles(templatesDirectory, "*.toml").Select(file => Path.GetFileNameWithoutExtension(file)).Order(StringComparer.Ordinal)]
            : [];
        throw new DhException(
            DhErrorReason.NotFound,
            $"There is no template '{nameOrPath}'{Spelling.DidYouMean(nameOrPath, known)}. " +
            (known.Length == 0 ? $"{templatesDirectory} holds none." : $"There are: {string.Join(", ", known)}; or give the path of a file (./{nameOrPath}.toml)."));
    }

    /// <summary>The same template at another version.</summary>
    /// <param name="version">1 to 40 of <c>A-Z a-z 0-9 . + _ -</c>, a letter or digit first.</param>
    /// <exception cref="DhException"><see cref="DhErrorReason.Usage"/>: this is no version.</exception>
    public Template WithVersion(string version)
    {
        ArgumentNullException.ThrowIfNull(version);
        return TemplateReader.IsVersion(version)
            ? this with { Version = version }
            : throw new DhException(DhErrorReason.Usage, $"'{version}' is no version: it has 1 to 40 letters, digits and . + _ -, a letter or digit first.");
    }

    /// <summary>The requirements with <c>{version}</c> filled in.</summary>
    internal IReadOnlyList<string> ResolveRequirements()
    {
        const string placeholder = "{version}";
        if (Version is null && Requirements.FirstOrDefault(text => text.Contains(placeholder, StringComparison.Ordinal)) is { } open)
        {
            throw new DhException(DhErrorReason.Image, $"The template '{Name}' requires '{open}' but has no version: add `version = \"...\"` to it, or say which.");
        }

        return [.. Requirements.Select(text => text.Replace(placeholder, Version, StringComparison.Ordinal))];
    }
}
