using System.Runtime.Versioning;
using Xunit.Sdk;

[assembly: SupportedOSPlatform("linux")]
// The tests count descriptors and measure times of this process, and each of them keeps the cores busy.
[assembly: Parallelization(Mode = ParallelMode.None)]
