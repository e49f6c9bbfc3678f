using System.Runtime.Versioning;
using Dh.Images;
using Dh.TestSupport;

namespace Dh.Tests.Images;

[SupportedOSPlatform("linux")]
public sealed class PythonPackagesTests
{
    [Fact]
    public void A_requirement_without_a_wheel_is_named() => Assert.Equal(
        "The Python requirement 'nompy==2'",
        PythonPackages.Culprit(
            [
                "Looking in links: /wheels",
                "ERROR: Could not find a version that satisfies the requirement nompy==2 (from versions: none)",
                "ERROR: No matching distribution found for nompy==2",
            ],
            ["numpy", "nompy==2"]));

    [Fact]
    public void When_pip_names_none_all_are_named() =>
        Assert.Equal("One of the Python requirements (a, b)", PythonPackages.Culprit(["ERROR: something else"], ["a", "b"]));

    [Theory]
    [InlineData("numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl", "numpy==2.4.6")]
    [InlineData("python_dateutil-4.0.0-py3-none-any.whl", "python_dateutil==4.0.0")]
    [InlineData("deephaven_server-41.1-0slim-py3-none-any.whl", "deephaven_server==41.1")]
    public void A_wheels_name_tells_its_package_and_version(string wheel, string pin) => Assert.Equal(pin, PythonPackages.PinOf(wheel));

    [Fact]
    public void With_a_wheelhouse_pip_looks_nowhere_else()
    {
        var command = PythonPackages.FetchCommand("/tree", "/pip.whl", "/req.txt", "/target", "/wheels");

        Assert.Equal("/tree/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2", command.Program);
        Assert.Equal(
            "--library-path /tree/usr/lib/x86_64-linux-gnu /tree/usr/bin/python3 -m pip --isolated --disable-pip-version-check --no-input --no-cache-dir " +
            "download --progress-bar off --only-binary :all: --no-index --find-links /wheels --dest /target --requirement /req.txt",
            string.Join(' ', command.Arguments));
    }

    [Fact]
    public void Without_one_it_is_configured_as_the_user_configured_it()
    {
        var command = PythonPackages.FetchCommand("/tree", "/pip.whl", "/req.txt", "/target", wheelhouse: null);

        Assert.True(command.WithUserEnvironment);
        Assert.DoesNotContain("--isolated", command.Arguments);
        Assert.DoesNotContain("--no-index", command.Arguments);
    }

    [Theory]
    [InlineData("41.2", "0.40.9, 41.0, 41.1", " The nearest versions there: 0.40.9, 41.0, 41.1.")]
    [InlineData("0.38.1", "0.35.0, 0.36.0, 0.36.1, 0.37.0, 0.38.0, 0.39.0, 0.40.1, 41.0, 41.1", " The nearest versions there: 0.36.1, 0.37.0, 0.38.0, 0.39.0, 0.40.1, 41.0.")]
    [InlineData("0.1", "41.0.rc1, 0.9.10, 0.9.9", " The nearest versions there: 0.9.9, 0.9.10, 41.0.rc1.")]
    [InlineData("1", "none", "")]
    public void The_nearest_versions_of_the_index_are_named(string wanted, string versions, string sentence) =>
        Assert.Equal(sentence, PythonPackages.NearestVersions(
        [
            $"ERROR: Could not find a version that satisfies the requirement deephaven-server=={wanted} (from versions: {versions})",
            $"ERROR: No matching distribution found for deephaven-server=={wanted}",
        ]));

    [Fact]
    public void A_wheelhouse_is_told_which_wheel_was_looked_for()
    {
        using var wheelhouse = new TempDir();
        wheelhouse.Write("deephaven_server-41.1-py3-none-any.whl", "");
        wheelhouse.Write("deephaven_core-41.2-py3-none-any.whl", "");

        Assert.Equal(
            " deephaven_server-41.2-*.whl was looked for; there is deephaven_server-41.1-py3-none-any.whl.",
            PythonPackages.LookedFor(["ERROR: No matching distribution found for deephaven-server==41.2"], wheelhouse.Path));
        Assert.Equal(
            " numpy-*-*.whl was looked for; there is no wheel of that package.",
            PythonPackages.LookedFor(["ERROR: No matching distribution found for numpy"], wheelhouse.Path));
    }
}
