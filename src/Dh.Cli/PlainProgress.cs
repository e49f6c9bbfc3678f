using Dh.Preparation;

namespace Dh.Cli;

/// <summary>A line on stderr for each step, for logs; a step that only moves on says nothing new.</summary>
internal sealed class PlainProgress : IProgress<PreparationProgress>
{
    private (string Step, string? Detail) _last;

    public void Report(PreparationProgress value)
    {
        bool isNew = value.Fraction is null ? _last != (value.Step, value.Detail) : _last.Step != value.Step;
        _last = (value.Step, value.Detail);
        if (isNew)
        {
            Console.Error.WriteLine(value.Detail is null ? value.Step : $"{value.Step}: {value.Detail}");
        }
    }
}
