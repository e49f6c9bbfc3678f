using System.Runtime.Versioning;
using Dh.Benchmarks;

[assembly: SupportedOSPlatform("linux")]

switch (args)
{
    case ["population"]:
        await PopulationBenchmark.RunAsync();
        return 0;
    case ["exec"]:
        return await ExecBenchmark.RunAsync() ? 0 : 1;
    case ["cage"]:
        return await CageBenchmark.RunAsync() ? 0 : 1;
    case ["memory"]:
        return await MemoryBenchmark.RunAsync() ? 0 : 1;
    case ["firecracker"]:
        return await FirecrackerBenchmark.RunAsync() ? 0 : 1;
    case ["deephaven"]:
        return await DeephavenBenchmark.RunAsync() ? 0 : 1;
    case ["pool"]:
        return await PoolBenchmark.RunAsync() ? 0 : 1;
    case ["soak"]:
        return await SoakBenchmark.RunAsync() ? 0 : 1;
    case ["hog"]:
        return await HogBenchmark.RunAsync() ? 0 : 1;
    default:
        Console.Error.WriteLine("usage: Dh.Benchmarks population|exec|cage|firecracker|memory|deephaven|pool|soak|hog");
        return 2;
}
