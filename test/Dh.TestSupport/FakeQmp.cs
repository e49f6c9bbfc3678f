using System.Text;
using System.Text.Json;

namespace Dh.TestSupport;

/// <summary>QEMU's side of its monitor, scripted.</summary>
public sealed class FakeQmp : FakePeer
{
    /// <summary>What QEMU says first.</summary>
    public const string Greeting = """{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": []}}""";

    /// <summary>Success.</summary>
    public const string Done = """{"return": {}}""";

    /// <summary>Sends one line.</summary>
    public Task SayLineAsync(string line) => SayAsync(line + "\n");

    /// <summary>Hears one command and returns its name.</summary>
    public async Task<string> HearCommandAsync()
    {
        var line = new List<byte>();
        for (byte next; (next = (await HearAsync(1))[0]) != '\n';)
        {
            line.Add(next);
        }

        using var json = JsonDocument.Parse(Encoding.UTF8.GetString([.. line]));
        return json.RootElement.GetProperty("execute").GetString()!;
    }

    /// <summary>Answers commands with these lines, one command after the other.</summary>
    public async Task AnswerAsync(params string[] answers)
    {
        foreach (string answer in answers)
        {
            await HearCommandAsync();
            await SayLineAsync(answer);
        }
    }
}
