using Dh.Images;
using Dh.TestSupport;

namespace Dh.Tests.Images;

public sealed class TemplateTests
{
    private const string Smallest = "name = \"t\"\npackages = [\"python3\"]\n";

    [Fact]
    public void The_smallest_template_gets_the_documented_defaults()
    {
        var template = Template.Parse(Smallest, "t.toml");

        Assert.Equal("t", template.Name);
        Assert.Equal("", template.Description);
        Assert.Equal("python", template.Engine);
        Assert.Null(template.Version);
        Assert.Equal("bookworm", template.Suite);
        Assert.Equal(["python3"], template.Packages);
        Assert.Empty(template.Requirements);
        Assert.Equal(512, template.MemoryMib);
        Assert.Equal("", template.WarmupCode);
        Assert.Equal("", template.RestoreCode);
        Assert.Equal("", template.RecordCode);
    }

    [Fact]
    public void Every_key_is_read()
    {
        var template = Template.Parse(
            """
            name = "data-1"
            description = "numbers"
            engine = "python"
            version = "2.0"
            suite = "trixie"
            packages = ["python3", "libstdc++6"]
            pip = ["numpy=={version}", "pandas[all] ; python_version > '3'"]
            memory_mib = 2048
            [warmup]
            code = '''
            import numpy
            '''
            [restore]
            code = "seed()"
            [record]
            code = "print(1)"
            """,
            "data.toml");

        Assert.Equal(("data-1", "numbers", "python", "2.0", "trixie"), (template.Name, template.Description, template.Engine, template.Version, template.Suite));
        Assert.Equal(["python3", "libstdc++6"], template.Packages);
        Assert.Equal(["numpy==2.0", "pandas[all] ; python_version > '3'"], template.ResolveRequirements());
        Assert.Equal(2048, template.MemoryMib);
        Assert.Equal("import numpy\n", template.WarmupCode);
        Assert.Equal("seed()", template.RestoreCode);
        Assert.Equal("print(1)", template.RecordCode);
    }

    [Fact]
    public void The_JVM_of_the_engine_deephaven_has_arguments() =>
        Assert.Equal(["-Xmx1g", "-Da=b,c"], Template.Parse(Smallest + "engine = \"deephaven\"\njvm_args = [\"-Xmx1g\", \"-Da=b,c\"]", "t.toml").JvmArguments);

    [Theory]
    [InlineData("warmup.code = \"x\"")]
    [InlineData("warmup = { code = \"x\" }")]
    [InlineData("[warmup]\ncode = \"x\"")]
    public void A_table_may_be_written_in_any_of_its_ways(string text) => Assert.Equal("x", Template.Parse(Smallest + text, "t.toml").WarmupCode);

    [Theory]
    [InlineData("name = \"t\"\npakages = []", "t.toml:2: unknown key 'pakages' (did you mean 'packages'?); known keys: name, description, engine, version, suite, packages, pip, jvm_args, memory_mib, warmup.code, restore.code, record.code")]
    [InlineData(Smallest + "colour = 1", "t.toml:3: unknown key 'colour'; known keys: name, description, engine, version, suite, packages, pip, jvm_args, memory_mib, warmup.code, restore.code, record.code")]
    [InlineData(Smallest + "[warmup]\ncod = \"x\"", "t.toml:4: unknown key 'warmup.cod' (did you mean 'warmup.code'?); known keys: name, description, engine, version, suite, packages, pip, jvm_args, memory_mib, warmup.code, restore.code, record.code")]
    [InlineData(Smallest + "[warmpu]\n", "t.toml:3: unknown table 'warmpu' (did you mean 'warmup'?); known tables: warmup, restore, record")]
    [InlineData(Smallest + "[[record]]\n", "t.toml:3: 'record' is one table: write [record]")]
    [InlineData(Smallest + "warmup = \"x\"", "t.toml:3: 'warmup' is a table: write [warmup] and below it code = \"\"\"...\"\"\"")]
    [InlineData("packages = [\"python3\"]", "t.toml: missing key: add `name = \"...\"`")]
    [InlineData("name = \"t\"", "t.toml: missing key: add `packages = [\"python3\"]`")]
    [InlineData("name = 3\npackages = []", "t.toml:1: 'name' must be a string, not an integer")]
    [InlineData("name = \"t\"\npackages = \"python3\"", "t.toml:2: 'packages' must be an array of strings, not a string")]
    [InlineData("name = \"t\"\npackages = [\"python3\", 3]", "t.toml:2: 'packages' must be an array of strings, not an array with something else in it")]
    [InlineData(Smallest + "memory_mib = \"512\"", "t.toml:3: 'memory_mib' must be an integer, not a string")]
    [InlineData(Smallest + "memory_mib = 64", "t.toml:3: 'memory_mib' is 128 to 1048576, not 64")]
    [InlineData(Smallest + "engine = \"ruby\"", "t.toml:3: unknown engine 'ruby'; known engines: python, deephaven")]
    [InlineData("name = \"../t\"\npackages = []", "t.toml:1: 'name' is 1 to 40 of a-z, 0-9 and '-', a letter or digit first, not \"../t\"")]
    [InlineData(Smallest + "version = \"a b\"", "t.toml:3: 'version' is 1 to 40 letters, digits and . + _ -, a letter or digit first, not \"a b\"")]
    [InlineData(Smallest + "suite = \"12\"", "t.toml:3: 'suite' is a Debian release by its code name, such as \"bookworm\", not \"12\"")]
    [InlineData("name = \"t\"\npackages = [\n  \"python3\",\n  \"--hook=x\",\n]", "t.toml:4: each of 'packages' is a Debian package's name, not \"--hook=x\"")]
    [InlineData(Smallest + "jvm_args = [\"-Xmx1g\"]", "t.toml:3: 'jvm_args' are for the engine deephaven; this template's is python")]
    [InlineData(Smallest + "engine = \"deephaven\"\njvm_args = [\"Xmx1g\"]", "t.toml:4: each of 'jvm_args' is one argument of the JVM, such as \"-Xmx1g\", not \"Xmx1g\"")]
    [InlineData(Smallest + "pip = [\"--index-url x\"]", "t.toml:3: each of 'pip' is one requirement in pip's notation, such as \"numpy==2.1\"; options do not belong here, not \"--index-url x\"")]
    public void A_mistake_is_named_with_its_line(string text, string message)
    {
        var error = Assert.Throws<DhException>(() => Template.Parse(text, "t.toml"));

        Assert.Equal(message, error.Message);
        Assert.Equal(DhErrorReason.Image, error.Reason);
    }

    [Theory]
    [InlineData("name = ", "t.toml:1: not valid TOML: ")]
    [InlineData("name = \"t\"\nname = \"u\"\n", "t.toml:2: not valid TOML: ")]
    [InlineData("name = \"t\"\n[warmup]\n[warmup]\n", "t.toml:3: not valid TOML: ")]
    public void Text_that_is_no_TOML_is_refused_with_its_line(string text, string start)
    {
        var error = Assert.Throws<DhException>(() => Template.Parse(text, "t.toml"));

        Assert.StartsWith(start, error.Message, StringComparison.Ordinal);
    }

    [Fact]
    public void A_version_placeholder_without_a_version_is_an_error()
    {
        var template = Template.Parse(Smallest + "pip = [\"thing=={version}\"]", "t.toml");

        var error = Assert.Throws<DhException>(() => template.ResolveRequirements());
        Assert.Equal("The template 't' requires 'thing=={version}' but has no version: add `version = \"...\"` to it, or say which.", error.Message);
        Assert.Equal(["thing==41.1"], template.WithVersion("41.1").ResolveRequirements());
    }

    [Fact]
    public void A_version_that_is_none_is_refused()
    {
        var error = Assert.Throws<DhException>(() => Template.Parse(Smallest, "t.toml").WithVersion("../41"));

        Assert.Equal("'../41' is no version: it has 1 to 40 letters, digits and . + _ -, a letter or digit first.", error.Message);
        Assert.Equal(DhErrorReason.Usage, error.Reason);
    }

    [Fact]
    public void A_template_is_found_by_name_and_by_path()
    {
        using var directory = new TempDir();
        string path = directory.Write("t.toml", Smallest);

        Assert.Equal("t", Template.Find("t", directory.Path).Name);
        Assert.Equal("t", Template.Find(path, "/nowhere").Name);
    }

    [Fact]
    public void A_template_that_is_not_there_is_answered_with_those_that_are()
    {
        using var directory = new TempDir();
        directory.Write("python.toml", Smallest);
        directory.Write("deephaven.toml", Smallest);

        var error = Assert.Throws<DhException>(() => Template.Find("pyton", directory.Path));
        Assert.Equal("There is no template 'pyton' (did you mean 'python'?). There are: deephaven, python; or give the path of a file (./pyton.toml).", error.Message);
        Assert.Equal(DhErrorReason.NotFound, error.Reason);
        Assert.Equal(DhErrorReason.NotFound, Assert.Throws<DhException>(() => Template.Find("./nowhere.toml", directory.Path)).Reason);
    }

    [Fact]
    public void The_python_template_that_comes_with_the_program_is_valid()
    {
        var template = Template.Find("python", Repository.PathOf("templates"));

        Assert.Equal("python", template.Name);
        Assert.Contains("python3", template.Packages);
        Assert.NotEqual("", template.WarmupCode);
        Assert.NotEqual("", template.RecordCode);
    }
}
