using System.CommandLine;

namespace Dh.Cli;

/// <summary><c>dh vm pool scale</c>: changes how many sandboxes are ready.</summary>
internal sealed class PoolScaleCommand : Command
{
    private readonly Argument<int> _size = new("N") { Description = "How many sandboxes are ready; with 0 runs restore on their own." };
    private readonly PoolChoice _choice = new();

    public PoolScaleCommand()
        : base("scale", "Changes how many sandboxes are ready.")
    {
        Add(_size);
        _choice.AddTo(this);
        SetAction(Run);
    }

    private int Run(ParseResult parsed)
    {
        _choice.FindOne(parsed).Scale(parsed.GetValue(_size));
        return (int)ExitCode.Success;
    }
}
