using System.Runtime.Versioning;
using Xunit.Sdk;
using Xunit.v3;

[assembly: SupportedOSPlatform("linux")]
// The tests count descriptors and measure times of this process, and each of them keeps the cores busy.
[assembly: Parallelization(Mode = ParallelMode.None)]
