using System.Runtime.Versioning;
using Dh.Images;

namespace Dh.Tests.Images;

[SupportedOSPlatform("linux")]
public sealed class RootTreeTests
{
    [Theory]
    [InlineData("3.11.2", "3.11")]
    [InlineData("3.13.5rc1", "3.13")]
    [InlineData("3", "3")]
    public void The_version_of_a_template_is_its_interpreters_first_two_numbers(string version, string minor) => Assert.Equal(minor, RootTree.MinorVersion(version));

    [Fact]
    public void Packages_are_listed_by_name() => Assert.Equal(
        [new ImagePackage("bash", "5.2-1+b1", "amd64"), new ImagePackage("tzdata", "2026a", "all")],
        RootTree.ParsePackages("tzdata\t2026a\tall\nbash\t5.2-1+b1\tamd64\n"));

    [Fact]
    public void Mounts_below_a_directory_are_found_innermost_first() => Assert.Equal(
        ["/home/a b/build/root/dev/null", "/home/a b/build/root"],
        BuildNamespace.MountsBelow(
            "/home/a b/build/",
            [
                @"22 1 254:0 / / rw,relatime - ext4 /dev/root rw",
                @"40 22 0:30 / /home/a\040b/build/root rw - tmpfs none rw",
                @"41 40 0:31 / /home/a\040b/build/root/dev/null rw - devtmpfs none rw",
                @"42 22 0:32 / /home/a\040b/build-2/root rw - tmpfs none rw",
            ]));
}
