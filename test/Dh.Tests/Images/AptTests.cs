using Dh.Images;

namespace Dh.Tests.Images;

public sealed class AptTests
{
    private const string Targets =
        """
        http://mirror.example/debian/|bookworm|bookworm|main|amd64|$(SIGNED_BY)
        http://mirror.example/debian/|bookworm|bookworm|main|i386|$(SIGNED_BY)
        http://mirror.example/debian/|bookworm-updates|bookworm-updates|main|amd64|$(SIGNED_BY)
        http://mirror.example/debian/|bookworm-backports|bookworm-backports|main|amd64|$(SIGNED_BY)
        http://mirror.example/debian-security/|bookworm-security|bookworm-security|main|amd64|/etc/apt/keyrings/own.gpg
        http://other.example/tools|nodistro|nodistro|main|amd64|$(SIGNED_BY)

        """;

    [Fact]
    public void The_hosts_sources_of_a_suite_are_taken_with_their_updates_and_no_others() => Assert.Equal(
        [
            "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian/ bookworm main",
            "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian/ bookworm-updates main",
            "deb [arch=amd64 signed-by=/etc/apt/keyrings/own.gpg] http://mirror.example/debian-security/ bookworm-security main",
        ],
        AptSource.ParseTargets(Targets, "bookworm").Select(source => source.ToString()));

    [Fact]
    public void A_source_that_is_written_as_stable_is_known_by_its_codename() => Assert.Equal(
        "deb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian/ stable main",
        Assert.Single(AptSource.ParseTargets("http://mirror.example/debian/|stable|bookworm|main|amd64|\n", "bookworm")).ToString());

    [Fact]
    public void A_host_without_the_suite_is_told_what_to_add()
    {
        var error = Assert.Throws<DhException>(() => AptSource.ParseTargets(Targets, "trixie"));

        Assert.Equal(
            "This host's apt has no source of Debian trixie: add one to /etc/apt/sources.list.d and run `apt-get update`, or name a mirror with --mirror. " +
            "It has: bookworm, bookworm-updates, bookworm-backports, bookworm-security, nodistro.",
            error.Message);
        Assert.Equal(DhErrorReason.Host, error.Reason);
    }

    [Fact]
    public void Updates_without_the_release_itself_are_not_enough() =>
        Assert.Throws<DhException>(() => AptSource.ParseTargets("http://mirror.example/debian/|bookworm-updates|bookworm-updates|main|amd64|\n", "bookworm"));

    [Fact]
    public void A_host_without_package_lists_is_told_to_fetch_them()
    {
        var error = Assert.Throws<DhException>(() => AptSource.ParseTargets("", "bookworm"));

        Assert.Equal("This host's apt has no package lists: run `apt-get update`, or name a mirror with --mirror.", error.Message);
    }

    [Theory]
    [InlineData("https://mirror.example/debian", "https://mirror.example/debian/ bookworm;https://mirror.example/debian/ bookworm-updates;https://mirror.example/debian-security/ bookworm-security")]
    [InlineData("file:///srv/archive/", "file:///srv/archive/ bookworm;file:///srv/archive/ bookworm-updates")]
    public void A_mirror_stands_for_the_release_and_its_updates(string mirror, string expected) =>
        Assert.Equal(expected.Split(';'), AptSource.OfMirror(mirror, "bookworm").Select(source => $"{source.Uri} {source.Release}"));

    [Theory]
    [InlineData("mirror.example/debian")]
    [InlineData("ftp://mirror.example/debian")]
    [InlineData("http://mirror.example/debian bookworm main\ndeb [trusted=yes] http://x")]
    public void What_is_no_mirror_is_refused(string mirror) =>
        Assert.Equal(DhErrorReason.Usage, Assert.Throws<DhException>(() => AptSource.OfMirror(mirror, "bookworm")).Reason);

    [Fact]
    public void Control_data_is_read_to_the_end_of_its_first_paragraph()
    {
        var fields = AptArchive.ParseControl("Package: a\nDepends: b (= 1), c\nDescription: one\n two\n .\nVersion: 1:2-3\n\nPackage: z\n");

        Assert.Equal(("a", "b (= 1), c", "one", "1:2-3"), (fields["Package"], fields["depends"], fields["Description"], fields["Version"]));
        Assert.Equal(4, fields.Count);
    }

    [Fact]
    public void The_hosts_proxy_is_passed_on_and_its_ideas_of_trust_are_not()
    {
        const string dump =
            """
            Acquire "";
            Acquire::AllowInsecureRepositories "1";
            Acquire::Check-Valid-Until "false";
            Acquire::http "";
            Acquire::http::Proxy "http://proxy.example:3128";
            Acquire::httpx::Proxy "http://no.example";
            APT::Update::Post-Invoke:: "rm -rf /";
            """;

        Assert.Equal(
            """
            Acquire::Check-Valid-Until "false";
            Acquire::http "";
            Acquire::http::Proxy "http://proxy.example:3128";

            """,
            AptArchive.SelectTransport(dump));
    }

    [Fact]
    public void A_simulation_names_what_would_be_installed() => Assert.Equal(
        ["python3-minimal", "tzdata"],
        AptArchive.ParseSimulation("Reading package lists...\nInst python3-minimal (3.11.2 Debian:12 [amd64])\nInst tzdata (2026a all)\nConf tzdata (2026a all)\n").Order());

    [Fact]
    public void The_kernels_package_is_what_the_meta_package_depends_on() =>
        Assert.Equal("linux-image-6.12.117+deb13-cloud-amd64", KernelPackage.PackageOf("linux-image-6.12.117+deb13-cloud-amd64 (= 6.12.117-1), x"));

    [Fact]
    public void A_meta_package_without_a_kernel_is_an_error() =>
        Assert.Equal("The package linux-image-cloud-amd64 names no kernel; it depends on 'x'.", Assert.Throws<DhException>(() => KernelPackage.PackageOf("x")).Message);
}
