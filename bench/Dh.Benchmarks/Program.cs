using System.Runtime.Versioning;
using Dh.Benchmarks;

[assembly: SupportedOSPlatform("linux")]

switch (args)
{
    case ["population"]:
        await PopulationBenchmark.RunAsync();
        return 0;
    default:
        Console.Error.WriteLine("usage: Dh.Benchmarks population");
        return 2;
}
