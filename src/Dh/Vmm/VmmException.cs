namespace Dh.Vmm;

/// <summary>A VMM refused a request.</summary>
/// <param name="request">What was asked for: <c>PUT /snapshot/load</c>.</param>
/// <param name="faultMessage">The VMM's own words, made one line.</param>
/// <param name="message">What happened.</param>
public sealed class VmmException(string request, string faultMessage, string message) : DhException(DhErrorReason.Vmm, message)
{
    /// <summary>What was asked for: <c>PUT /snapshot/load</c>.</summary>
    public string Request { get; } = request;

    /// <summary>The VMM's own words, made one line.</summary>
    public string FaultMessage { get; } = faultMessage;
}
