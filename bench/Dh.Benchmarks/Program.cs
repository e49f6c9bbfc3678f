using System.Runtime.Versioning;
using Dh.Benchmarks;

[assembly: SupportedOSPlatform("linux")]

switch (args)
{
    case ["population"]:
        await PopulationBenchmark.RunAsync();
        return 0;
    case ["exec"]:
        await ExecBenchmark.RunAsync();
        return 0;
    default:
        Console.Error.WriteLine("usage: Dh.Benchmarks population|exec");
        return 2;
}
