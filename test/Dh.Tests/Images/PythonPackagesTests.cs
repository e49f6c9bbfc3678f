using System.Runtime.Versioning;
using Dh.Images;

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
}
