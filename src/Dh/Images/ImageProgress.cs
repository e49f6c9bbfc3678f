namespace Dh.Images;

/// <summary>What an image build is doing.</summary>
/// <param name="Step">The step, for people: <c>Debian packages</c>.</param>
/// <param name="Detail">What of it, or null.</param>
/// <param name="Fraction">How much of the whole build is done, 0 to 1; null where nothing new is known about that.</param>
public sealed record ImageProgress(string Step, string? Detail, double? Fraction);
