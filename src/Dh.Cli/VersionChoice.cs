using System.Text.RegularExpressions;
using Dh.Snapshots;
using Tomlyn.Parsing;
using Tomlyn.Syntax;

namespace Dh.Cli;

/// <summary>Which snapshot to run in, and why that one.</summary>
/// <param name="Template">The template's name; null for any.</param>
/// <param name="Version">The version; null for the newest snapshot.</param>
/// <param name="Reason">What decided, for a verbose run.</param>
internal sealed partial record VersionChoice(string? Template, string? Version, string Reason)
{
    /// <summary>
    /// The first of: the options, <c>DH_VERSION</c>, the nearest <c>.dhrc</c> from the working directory up, <c>default_version</c> in
    /// <c>$DH_HOME/config.toml</c>, the newest prepared snapshot.
    /// </summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.Usage"/>: a file of settings does not say what it should.</exception>
    public static VersionChoice Of(string? template, string? version, DhHome home)
    {
        if (template is not null || version is not null)
        {
            return new(template, version, version is null ? "--template" : "--version");
        }

        if (Environment.GetEnvironmentVariable("DH_VERSION") is { Length: > 0 } wanted)
        {
            return new(null, wanted, "DH_VERSION");
        }

        for (string? directory = Environment.CurrentDirectory; directory is not null; directory = Path.GetDirectoryName(directory))
        {
            string path = Path.Combine(directory, ".dhrc");
            if (File.Exists(path))
            {
                return new(null, ReadVersionFile(path), path);
            }
        }

        return File.Exists(home.ConfigPath) && ReadString(home.ConfigPath, "default_version") is { } configured
            ? new(null, configured, home.ConfigPath)
            : new(null, null, "the newest prepared snapshot");
    }

    /// <summary>Opens the snapshot.</summary>
    /// <exception cref="DhException"><see cref="DhErrorReason.NotFound"/>: there is none; <see cref="DhErrorReason.Snapshot"/>: it cannot be used.</exception>
    public Snapshot Open(SnapshotStore store, DhHome home)
    {
        if (Template is not null && Version is not null)
        {
            return store.Open(Template, Version);
        }

        return store.List(out var damaged, Template, Version) is [var newest, ..] ? newest : throw NotFound(store, damaged, home);
    }

    private DhException NotFound(SnapshotStore store, IReadOnlyList<string> damaged, DhHome home)
    {
        if (damaged.Count > 0)
        {
            return new(DhErrorReason.Snapshot, string.Join(' ', damaged));
        }

        var snapshots = store.List();
        string prepare = "dh vm prepare" + (Template is not null ? $" --template {Template}" : "") + (Version is not null ? $" --version {Version}" : "");
        string what = Template is not null ? $" of the template '{Template}'" : Version is not null ? $" of version {Version} ({Reason})" : "";
        string known = snapshots.Count == 0
            ? ""
            : $" There are: {string.Join(", ", snapshots.Select(snapshot => $"{snapshot.Manifest.Template} {snapshot.Manifest.Version}").Distinct())}.";
        return new(DhErrorReason.NotFound, $"There is no snapshot{what} in {home.SnapshotsDirectory}.{known} Prepare one: {prepare}");
    }

    // Either the version alone, or TOML with `version = "..."`.
    private static string ReadVersionFile(string path)
    {
        string text = File.ReadAllText(path).Trim();
        return VersionPattern.IsMatch(text)
            ? text
            : ReadString(path, "version") ?? throw new DhException(DhErrorReason.Usage, $"{path} names no version: write version = \"...\" into it.");
    }

    private static string? ReadString(string path, string key)
    {
        var document = SyntaxParser.Parse(File.ReadAllText(path), sourceName: path);
        if (document.Diagnostics.FirstOrDefault(diagnostic => diagnostic.Kind == DiagnosticMessageKind.Error) is { } error)
        {
            throw new DhException(DhErrorReason.Usage, $"{path}:{error.Span.Start.Line + 1}: not valid TOML: {error.Message}");
        }

        var pair = document.KeyValues.FirstOrDefault(pair => pair.Key is { Key: BareKeySyntax { Key.Text: var name } } && name == key);
        return pair?.Value switch
        {
            null => null,
            StringValueSyntax { Value: { } value } when VersionPattern.IsMatch(value) => value,
            _ => throw new DhException(DhErrorReason.Usage, $"{path}:{pair.Span.Start.Line + 1}: {key} is a version in quotes, such as {key} = \"3.11\"."),
        };
    }

    [GeneratedRegex(@"\A[A-Za-z0-9][A-Za-z0-9.+_-]{0,39}\z")]
    private static partial Regex VersionPattern { get; }
}
