using System.Text;
using System.Threading.Channels;

namespace Dh.TestSupport;

/// <summary>A run of code in a fake Firecracker's guest, as the program sees it that plays the code.</summary>
public sealed class FakeGuestRun
{
    private readonly FakeGuestSession _session;
    private readonly Channel<(byte[] Bytes, bool End)> _input = Channel.CreateUnbounded<(byte[], bool)>();
    private readonly CancellationTokenSource _cancelled;

    internal FakeGuestRun(FakeGuestSession session, long id, FakeVcpu vcpu, CancellationToken ended)
    {
        _session = session;
        _cancelled = CancellationTokenSource.CreateLinkedTokenSource(ended);
        Id = id;
        Vcpu = vcpu;
    }

    /// <summary>The request's number.</summary>
    public long Id { get; }

    /// <summary>The machine's virtual CPU.</summary>
    public FakeVcpu Vcpu { get; }

    /// <summary>Cancelled when the host interrupts the code, or has gone.</summary>
    public CancellationToken Cancelled => _cancelled.Token;

    /// <summary>The value of the last expression.</summary>
    public string? ResultRepr { get; set; }

    /// <summary>Writes to standard output.</summary>
    public Task PrintAsync(string text) => SendAsync("stdout", text);

    /// <summary>Writes to standard error.</summary>
    public Task PrintErrorAsync(string text) => SendAsync("stderr", text);

    /// <summary>Sends bytes that need not be of the protocol.</summary>
    public Task SendFrameAsync(string header, byte[]? body = null) => _session.SendAsync(header, body);

    /// <summary>Reads standard input to its end.</summary>
    public async Task<string> ReadInputAsync()
    {
        var text = new StringBuilder();
        while (true)
        {
            await _session.SendAsync($$"""{"type": "stdin-credit", "id": {{Id}}, "bytes": 65536}""");
            var (bytes, end) = await _input.Reader.ReadAsync(Cancelled);
            text.Append(Encoding.UTF8.GetString(bytes));
            if (end)
            {
                return text.ToString();
            }
        }
    }

    internal void TakeInput(byte[] bytes, bool end) => _input.Writer.TryWrite((bytes, end));

    internal void Cancel() => _cancelled.Cancel();

    private Task SendAsync(string type, string text) => _session.SendAsync($$"""{"type": "{{type}}", "id": {{Id}}}""", Encoding.UTF8.GetBytes(text));
}
