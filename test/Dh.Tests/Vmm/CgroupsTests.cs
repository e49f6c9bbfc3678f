using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.Tests.Vmm;

/// <summary>Where a VMM's cgroups go, on hosts that are played by directories.</summary>
public sealed class CgroupsTests : IDisposable
{
    private readonly TempDir _root = new();

    [Fact]
    public void Version_2_has_one_beside_all_others_with_the_controllers_given_to_it()
    {
        _root.Write("cgroup.controllers", "cpuset cpu io memory pids\n");
        _root.Write("cgroup.subtree_control", "");
        _root.Write("dh/cgroup.subtree_control", "");
        var cgroup = Assert.Single(new Cgroups(_root.Path, "0::/user.slice\n").Of("id", 1000, 130));
        Assert.Equal(_root["dh/id"], cgroup.Directory);
        Assert.Equal([("memory.max", "1000"), ("pids.max", "130"), ("cpu.weight", "100")], cgroup.Settings);
        Assert.Equal("+memory +pids +cpu", File.ReadAllText(_root["cgroup.subtree_control"]));
        Assert.Equal("+memory +pids +cpu", File.ReadAllText(_root["dh/cgroup.subtree_control"]));
    }

    [Fact]
    public void Where_swap_is_accounted_there_is_none()
    {
        _root.Write("cgroup.controllers", "cpu memory pids\n");
        _root.Write("cgroup.subtree_control", "cpu memory pids\n");
        _root.Write("dh/cgroup.subtree_control", "cpu memory pids\n");
        _root.Write("dh/memory.swap.max", "max\n");
        Assert.Contains(("memory.swap.max", "0"), Assert.Single(new Cgroups(_root.Path, "0::/\n").Of("id", 1000, 130)).Settings);
    }

    [Fact]
    public void Version_1_has_one_in_each_hierarchy_below_this_processs_own()
    {
        _root.Write("memory/container/cgroup.procs", "");
        _root.Write("pids/cgroup.procs", "");
        _root.Write("cpu/cgroup.procs", "");
        var cgroups = new Cgroups(_root.Path, "9:pids:/\n4:memory:/container\n1:cpu,cpuacct:/not/mounted/here\n0::/\n").Of("id", 1000, 130);
        Assert.Equal([_root["memory/container/dh-id"], _root["pids/dh-id"], _root["cpu/dh-id"]], cgroups.Select(cgroup => cgroup.Directory));
        Assert.Equal(("memory.limit_in_bytes", "1000"), cgroups[0].Settings[0]);
        Assert.Equal([("pids.max", "130")], cgroups[1].Settings);
        Assert.Equal([("cpu.shares", "1024")], cgroups[2].Settings);
    }

    [Theory]
    [InlineData("dh/id/cpu.weight", "10")]
    [InlineData("cpu/dh-id/cpu.shares", "102")]
    public void A_weight_is_given_in_the_units_of_its_version(string file, string weight)
    {
        _root.Write("cpu/cgroup.procs", "");
        _root.Write(file, "");
        var cgroups = new Cgroups(_root.Path, "1:cpu:/\n0::/\n");
        cgroups.SetCpuWeight("id", 10);
        cgroups.SetCpuWeight("other", 10); // it has ended: nothing happens
        Assert.Equal(weight, File.ReadAllText(_root[file]));
    }

    [Theory]
    [InlineData("dh/id/cpu.idle")]
    [InlineData("cpu/dh-id/cpu.idle")]
    public void A_machine_gives_way_and_has_its_weight_again(string file)
    {
        _root.Write("cpu/cgroup.procs", "");
        _root.Write(file, "");
        var cgroups = new Cgroups(_root.Path, "1:cpu:/\n0::/\n");
        cgroups.SetIdle("id", true);
        cgroups.SetIdle("other", true); // it has ended, or the kernel has no such setting: nothing happens
        Assert.Equal("1", File.ReadAllText(_root[file]));
        cgroups.SetIdle("id", false);
        Assert.Equal("0", File.ReadAllText(_root[file]));
    }

    [Theory]
    [InlineData("cgroup.controllers", "hugetlb\n")] // version 2 beside version 1
    [InlineData("memory/cgroup.procs", "")] // one hierarchy is not enough
    [InlineData("nothing", "")]
    public void Without_the_controllers_there_is_none(string file, string contents)
    {
        _root.Write(file, contents);
        Assert.Empty(new Cgroups(_root.Path, "4:memory:/\n0::/\n").Of("id", 1000, 130));
    }

    [Fact]
    public void What_a_killed_launcher_left_is_removed()
    {
        _root.Write("memory/cgroup.procs", "");
        string memory = Directory.CreateDirectory(_root["memory/dh-id"]).FullName;
        string other = Directory.CreateDirectory(_root["memory/dh-other"]).FullName;
        string unified = Directory.CreateDirectory(_root["dh/id"]).FullName;
        new Cgroups(_root.Path, "4:memory:/\n").EndAbandoned("id");
        Assert.False(Directory.Exists(memory) || Directory.Exists(unified));
        Assert.True(Directory.Exists(other));
    }

    [Fact]
    public void A_launchers_words_on_its_cage_are_understood() => Assert.Equal(
        [new CageLayer("user", true, null), new CageLayer("network", false, "unshare: EPERM")], CageLayer.Parse(["+user", "-network:unshare:EPERM"]));

    [Theory]
    [InlineData("")]
    [InlineData("+")]
    public void Words_of_another_launcher_are_refused(string word) => Assert.Throws<DhException>(() => CageLayer.Parse([word]));

    public void Dispose() => _root.Dispose();
}
