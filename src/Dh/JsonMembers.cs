using System.Buffers;
using System.Text;
using System.Text.Json;

namespace Dh;

/// <summary>
/// The members of a JSON object, each of the type that it should have. For what every run reads and writes: a serializer that meets a type for the
/// first time looks for its attributes by reflection (System.Text.Json's JsonPolymorphismOptions), and all of that was a third of the processor
/// time of a pool's client.
/// </summary>
internal static class JsonMembers
{
    /// <summary>Reads an object.</summary>
    /// <param name="json">UTF-8, one value.</param>
    /// <param name="maxDepth">How deep it may be.</param>
    /// <param name="read">Takes the object's members; the element is of no use afterwards.</param>
    /// <returns>What was read; null for the JSON value null.</returns>
    /// <exception cref="JsonException">It is no JSON, no object, too deep, or a member is not what it should be; the message names that.</exception>
    public static T? Read<T>(ReadOnlyMemory<byte> json, int maxDepth, Func<JsonElement, T> read)
        where T : class
    {
        using var document = JsonDocument.Parse(json, new JsonDocumentOptions { MaxDepth = maxDepth });
        try
        {
            return document.RootElement.ValueKind == JsonValueKind.Null ? null : read(Require(document.RootElement, JsonValueKind.Object, "$"u8));
        }
        catch (InvalidOperationException e)
        {
            throw new JsonException("a name or a text in it is no Unicode", e); // found only when it is looked at
        }
    }

    /// <summary>Writes an object.</summary>
    /// <param name="writeMembers">Writes its members.</param>
    /// <returns>UTF-8.</returns>
    public static ReadOnlyMemory<byte> Write(Action<Utf8JsonWriter> writeMembers)
    {
        var output = new ArrayBufferWriter<byte>();
        using (var json = new Utf8JsonWriter(output))
        {
            json.WriteStartObject();
            writeMembers(json);
            json.WriteEndObject();
        }

        return output.WrittenMemory;
    }

    /// <summary>Whether it is there, and not null.</summary>
    public static bool Has(this JsonElement json, ReadOnlySpan<byte> name) => Find(json, name) is not null;

    /// <summary>A string; null when it is not there, or null.</summary>
    public static string? Text(this JsonElement json, ReadOnlySpan<byte> name) =>
        Find(json, name) is not { } member ? null : Require(member, JsonValueKind.String, name).GetString();

    /// <summary>An integer; null when it is not there, or null.</summary>
    public static int? Int32(this JsonElement json, ReadOnlySpan<byte> name) =>
        Find(json, name) is not { } member ? null : Require(member, JsonValueKind.Number, name).TryGetInt32(out int value) ? value : throw Wrong(name);

    /// <summary>An integer; null when it is not there, or null.</summary>
    public static long? Int64(this JsonElement json, ReadOnlySpan<byte> name) =>
        Find(json, name) is not { } member ? null : Require(member, JsonValueKind.Number, name).TryGetInt64(out long value) ? value : throw Wrong(name);

    /// <summary>A number; null when it is not there, or null.</summary>
    public static double? Double(this JsonElement json, ReadOnlySpan<byte> name) =>
        Find(json, name) is not { } member ? null : Require(member, JsonValueKind.Number, name).TryGetDouble(out double value) ? value : throw Wrong(name);

    /// <summary>True or false; false when it is not there.</summary>
    public static bool Boolean(this JsonElement json, ReadOnlySpan<byte> name) =>
        json.TryGetProperty(name, out var member) && (member.ValueKind == JsonValueKind.True || (member.ValueKind != JsonValueKind.False ? throw Wrong(name) : false));

    /// <summary>A date with its offset (ISO 8601); null when it is not there, or null.</summary>
    public static DateTimeOffset? Date(this JsonElement json, ReadOnlySpan<byte> name) =>
        Find(json, name) is not { } member ? null : Require(member, JsonValueKind.String, name).TryGetDateTimeOffset(out var value) ? value : throw Wrong(name);

    /// <summary>An object; null when it is not there, or null.</summary>
    public static T? Object<T>(this JsonElement json, ReadOnlySpan<byte> name, Func<JsonElement, T> read)
        where T : class =>
        Find(json, name) is not { } member ? null : read(Require(member, JsonValueKind.Object, name));

    /// <summary>An array of objects; null when it is not there, or null.</summary>
    public static T[]? Array<T>(this JsonElement json, ReadOnlySpan<byte> name, Func<JsonElement, T> read)
    {
        if (Find(json, name) is not { } member)
        {
            return null;
        }

        var values = new T[Require(member, JsonValueKind.Array, name).GetArrayLength()];
        int count = 0;
        foreach (var value in member.EnumerateArray())
        {
            values[count++] = read(Require(value, JsonValueKind.Object, name));
        }

        return values;
    }

    /// <summary>A member that must be there.</summary>
    /// <exception cref="JsonException">It is not.</exception>
    public static T Required<T>(this T? value, ReadOnlySpan<byte> name)
        where T : class => value ?? throw Missing(name);

    /// <summary>A member that must be there.</summary>
    /// <exception cref="JsonException">It is not.</exception>
    public static T Required<T>(this T? value, ReadOnlySpan<byte> name)
        where T : struct => value ?? throw Missing(name);

    private static JsonElement? Find(JsonElement json, ReadOnlySpan<byte> name) =>
        json.TryGetProperty(name, out var member) && member.ValueKind != JsonValueKind.Null ? member : null;

    private static JsonElement Require(JsonElement value, JsonValueKind kind, ReadOnlySpan<byte> name) => value.ValueKind == kind ? value : throw Wrong(name);

    private static JsonException Missing(ReadOnlySpan<byte> name) => new($"`{Encoding.UTF8.GetString(name)}` is missing");

    private static JsonException Wrong(ReadOnlySpan<byte> name) => new($"`{Encoding.UTF8.GetString(name)}` has another type or range");
}
