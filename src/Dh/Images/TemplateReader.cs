using System.Text.RegularExpressions;
using Tomlyn.Parsing;
using Tomlyn.Syntax;

namespace Dh.Images;

/// <summary>
/// Reads a template from Tomlyn's syntax tree. The tree knows the line of everything, which errors name, and needs no reflection.
/// </summary>
internal sealed partial class TemplateReader
{
    private const int MinMemoryMib = 128;
    private const int MaxMemoryMib = 1_048_576;

    private static readonly string[] KnownKeys =
        ["name", "description", "engine", "version", "suite", "packages", "pip", "jvm_args", "memory_mib", "warmup.code", "restore.code", "record.code"];

    private static readonly string[] KnownTables = ["warmup", "restore", "record"];

    private readonly string _source;
    private readonly Dictionary<string, KeyValueSyntax> _values = new(StringComparer.Ordinal);

    private TemplateReader(string source) => _source = source;

    public static Template Read(string text, string source)
    {
        var reader = new TemplateReader(source);
        var document = SyntaxParser.Parse(text, sourceName: source);
        if (document.Diagnostics.FirstOrDefault(diagnostic => diagnostic.Kind == DiagnosticMessageKind.Error) is { } error)
        {
            throw reader.Error(error.Span, $"not valid TOML: {error.Message}");
        }

        reader.Collect("", document.KeyValues);
        foreach (var table in document.Tables)
        {
            string name = PathOf(table.Name!);
            if (table is TableArraySyntax && KnownTables.Contains(name))
            {
                throw reader.Error(table.Span, $"'{name}' is one table: write [{name}]");
            }

            if (!KnownTables.Contains(name))
            {
                throw reader.Error(table.Span, $"unknown table '{name}'{Spelling.DidYouMean(name, KnownTables)}; known tables: {string.Join(", ", KnownTables)}");
            }

            reader.Collect(name + ".", table.Items);
        }

        return reader.ToTemplate();
    }

    public static bool IsVersion(string text) => VersionPattern.IsMatch(text);

    private Template ToTemplate() => new()
    {
        Name = String("name", NamePattern, "1 to 40 of a-z, 0-9 and '-', a letter or digit first") ?? throw Missing("name = \"...\""),
        Description = String("description") ?? "",
        Engine = Engine(),
        Version = String("version", VersionPattern, "1 to 40 letters, digits and . + _ -, a letter or digit first"),
        Suite = String("suite", SuitePattern, "a Debian release by its code name, such as \"bookworm\"") ?? "bookworm",
        Packages = Strings("packages", PackagePattern, "a Debian package's name") ?? throw Missing("packages = [\"python3\"]"),
        Requirements = Strings("pip", RequirementPattern, "one requirement in pip's notation, such as \"numpy==2.1\"; options do not belong here") ?? [],
        JvmArguments = JvmArguments(),
        MemoryMib = Integer("memory_mib", MinMemoryMib, MaxMemoryMib) ?? 512,
        WarmupCode = String("warmup.code") ?? "",
        RestoreCode = String("restore.code") ?? "",
        RecordCode = String("record.code") ?? "",
    };

    // `a.b = 1`, `[a]` + `b = 1` and `a = { b = 1 }` are one thing.
    private void Collect(string prefix, IEnumerable<KeyValueSyntax> pairs)
    {
        foreach (var pair in pairs)
        {
            string path = prefix + PathOf(pair.Key!);
            if (pair.Value is InlineTableSyntax inline && KnownTables.Contains(path))
            {
                Collect(path + ".", inline.Items.Select(item => item.KeyValue!));
            }
            else if (KnownTables.Contains(path))
            {
                throw Error(pair.Span, $"'{path}' is a table: write [{path}] and below it code = \"\"\"...\"\"\"");
            }
            else if (!KnownKeys.Contains(path))
            {
                throw Error(pair.Span, $"unknown key '{path}'{Spelling.DidYouMean(path, KnownKeys)}; known keys: {string.Join(", ", KnownKeys)}");
            }
            else
            {
                _values[path] = pair;
            }
        }
    }

    private string Engine()
    {
        string engine = String("engine") ?? "python";
        return Template.Engines.Contains(engine)
            ? engine
            : throw Error(_values["engine"].Span, $"unknown engine '{engine}'; known engines: {string.Join(", ", Template.Engines)}");
    }

    private string[] JvmArguments()
    {
        string[] arguments = Strings("jvm_args", JvmArgumentPattern, "one argument of the JVM, such as \"-Xmx1g\"") ?? [];
        return arguments.Length == 0 || Engine() == "deephaven"
            ? arguments
            : throw Error(_values["jvm_args"].Span, $"'jvm_args' are for the engine deephaven; this template's is {Engine()}");
    }

    private string? String(string key, Regex? pattern = null, string? expected = null)
    {
        if (!_values.TryGetValue(key, out var pair))
        {
            return null;
        }

        if (pair.Value is not StringValueSyntax { Value: { } value })
        {
            throw WrongType(pair, key, "a string");
        }

        return pattern is null || pattern.IsMatch(value) ? value : throw Error(pair.Span, $"'{key}' is {expected}, not \"{value}\"");
    }

    private string[]? Strings(string key, Regex pattern, string expected)
    {
        if (!_values.TryGetValue(key, out var pair))
        {
            return null;
        }

        if (pair.Value is not ArraySyntax array)
        {
            throw WrongType(pair, key, "an array of strings");
        }

        return [.. array.Items.Select(item => item.Value is StringValueSyntax { Value: { } value }
            ? pattern.IsMatch(value) ? value : throw Error(item.Span, $"each of '{key}' is {expected}, not \"{value}\"")
            : throw WrongType(pair, key, "an array of strings"))];
    }

    private int? Integer(string key, int minimum, int maximum)
    {
        if (!_values.TryGetValue(key, out var pair))
        {
            return null;
        }

        if (pair.Value is not IntegerValueSyntax { Value: var value })
        {
            throw WrongType(pair, key, "an integer");
        }

        return value >= minimum && value <= maximum ? (int)value : throw Error(pair.Span, $"'{key}' is {minimum} to {maximum}, not {value}");
    }

    private static string PathOf(KeySyntax key) => string.Join('.', [Part(key.Key!), .. key.DotKeys.Select(item => Part(item.Key!))]);

    private static string Part(SyntaxNode key) => key switch
    {
        StringValueSyntax quoted => quoted.Value ?? "",
        BareKeySyntax bare => bare.Key?.Text ?? "",
        _ => key.ToString() ?? "",
    };

    private static string Describe(SyntaxNode? value) => value switch
    {
        StringValueSyntax => "a string",
        IntegerValueSyntax => "an integer",
        FloatValueSyntax => "a float",
        BooleanValueSyntax => "a boolean",
        ArraySyntax => "an array",
        InlineTableSyntax => "a table",
        _ => "something else",
    };

    private DhException WrongType(KeyValueSyntax pair, string key, string expected)
    {
        string found = expected == "an array of strings" && pair.Value is ArraySyntax ? "an array with something else in it" : Describe(pair.Value);
        return Error(pair.Span, $"'{key}' must be {expected}, not {found}");
    }

    private DhException Missing(string line) => new(DhErrorReason.Image, $"{_source}: missing key: add `{line}`");

    private DhException Error(SourceSpan span, string message) => new(DhErrorReason.Image, $"{_source}:{span.Start.Line + 1}: {message}");

    [GeneratedRegex(@"\A[a-z0-9][a-z0-9-]{0,39}\z")]
    private static partial Regex NamePattern { get; }

    [GeneratedRegex(@"\A[A-Za-z0-9][A-Za-z0-9.+_-]{0,39}\z")]
    private static partial Regex VersionPattern { get; }

    [GeneratedRegex(@"\A[a-z]+\z")]
    private static partial Regex SuitePattern { get; }

    // Debian Policy 5.6.1; it also keeps mmdebstrap from taking an entry for a file or an apt pattern.
    [GeneratedRegex(@"\A[a-z0-9][a-z0-9+.-]+\z")]
    private static partial Regex PackagePattern { get; }

    [GeneratedRegex(@"\A-[^\s\0]+\z")]
    private static partial Regex JvmArgumentPattern { get; }

    [GeneratedRegex(@"\A[A-Za-z0-9][^\r\n]*\z")]
    private static partial Regex RequirementPattern { get; }
}
