using Dh.IntegrationTests.Firecracker;
using Dh.TestSupport;
using Dh.Vmm;

namespace Dh.IntegrationTests.Drivers;

/// <summary>The contract over a Firecracker that is played, with real memory and a real userfaultfd: each run has all of it checked.</summary>
public sealed class FirecrackerContract : DriverContract, IAsyncLifetime
{
    private FirecrackerHome _home = null!;

    protected override DhProgram Dh => _home.Dh;

    protected override string VmmName => "firecracker";

    protected override VmmPrograms Programs => _home.Programs;

    public async ValueTask InitializeAsync() => _home = await FirecrackerHome.CreateAsync();

    public ValueTask DisposeAsync()
    {
        _home.Dispose();
        return ValueTask.CompletedTask;
    }

    protected override void Play(string code, Func<FakeGuestRun, Task<int>> program) => _home.Fake.Guest.Programs[code] = program;

    protected override void SlowDown() => _home.Fake.Play("vsock silence");
}
