using System.Buffers.Binary;
using System.Text;
using System.Text.Json;

namespace Dh.TestSupport;

/// <summary>The runner's side of the guest protocol, scripted.</summary>
public sealed class FakeGuest : FakePeer
{
    /// <summary>What a connection over vsock begins with.</summary>
    public const string Ready = """{"type": "ready", "protocol": 2, "engine": "python", "engine_version": "3.11.2"}""";

    /// <summary>The right answer to the host's hello, of a guest whose clock (in the year 2100) is not behind.</summary>
    public const string Hello = """{"type": "hello", "protocol": 2, "wall_clock_ns": 4102444800000000000}""";

    /// <summary>A run that went well.</summary>
    public static string Result(long id = 1) => $$"""{"type": "result", "id": {{id}}, "outcome": "exited", "exit_code": 0, "run_ms": 1.5}""";

    /// <summary>A frame's bytes, with lengths that are true.</summary>
    public static byte[] Frame(string header, byte[]? body = null)
    {
        byte[] text = Encoding.UTF8.GetBytes(header);
        return [.. Prefix((uint)text.Length, (uint)(body?.Length ?? 0)), .. text, .. body ?? []];
    }

    /// <summary>The first bytes of a frame.</summary>
    public static byte[] Prefix(uint headerLength, uint bodyLength)
    {
        byte[] bytes = new byte[8];
        BinaryPrimitives.WriteUInt32LittleEndian(bytes, headerLength);
        BinaryPrimitives.WriteUInt32LittleEndian(bytes.AsSpan(4), bodyLength);
        return bytes;
    }

    /// <summary>Sends one frame.</summary>
    public Task SayFrameAsync(string header, byte[]? body = null) => SayAsync(Frame(header, body));

    /// <summary>Hears one frame and returns its type and its body.</summary>
    public async Task<(string Type, byte[] Body)> HearFrameAsync()
    {
        byte[] prefix = await HearAsync(8);
        byte[] header = await HearAsync((int)BinaryPrimitives.ReadUInt32LittleEndian(prefix));
        byte[] body = await HearAsync((int)BinaryPrimitives.ReadUInt32LittleEndian(prefix.AsSpan(4)));
        using var json = JsonDocument.Parse(header);
        return (json.RootElement.GetProperty("type").GetString()!, body);
    }
}
