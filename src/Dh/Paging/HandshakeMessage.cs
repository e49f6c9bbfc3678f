using System.Text.Json;

namespace Dh.Paging;

/// <summary>
/// The text of the handshake: a JSON array of regions. VMMs have been seen to send a first message without the descriptor and then the
/// full one, which a stream socket may deliver glued together: the last complete array counts.
/// </summary>
internal static class HandshakeMessage
{
    /// <summary>More text than any VMM sends: a region takes about 110 bytes.</summary>
    public const int MaxLength = 64 * 1024;

    /// <summary>More regions than any VMM has.</summary>
    public const int MaxRegions = 256;

    private static readonly JsonReaderOptions Options = new() { AllowMultipleValues = true, MaxDepth = 4 };

    /// <summary>Parses what was received so far.</summary>
    /// <param name="text">All bytes from the start.</param>
    /// <returns>The last array, when the text ends with a complete one; null when more must follow.</returns>
    /// <exception cref="PageServerException">The text cannot become a handshake, whatever follows.</exception>
    public static List<GuestRegion>? TryParse(ReadOnlySpan<byte> text)
    {
        try
        {
            var reader = new Utf8JsonReader(text, isFinalBlock: false, new JsonReaderState(Options));
            List<GuestRegion>? last = null;
            while (reader.Read())
            {
                if (reader.TokenType != JsonTokenType.StartArray)
                {
                    throw new PageServerException($"The handshake is refused: expected a JSON array of regions, found {reader.TokenType} at byte {reader.TokenStartIndex}.");
                }

                last = ReadRegions(ref reader);
                if (last is null)
                {
                    return null;
                }
            }

            return text[(int)reader.BytesConsumed..].IndexOfAnyExcept(" \t\r\n"u8) < 0 ? last : null;
        }
        catch (JsonException e)
        {
            throw new PageServerException($"The handshake is refused: malformed JSON at byte {e.BytePositionInLine}.", e);
        }
        catch (InvalidOperationException e)
        {
            // A name that is no UTF-8, or escapes half of a surrogate pair.
            throw new PageServerException("The handshake is refused: malformed text in a member's name.", e);
        }
    }

    private static List<GuestRegion>? ReadRegions(ref Utf8JsonReader reader)
    {
        var regions = new List<GuestRegion>();
        while (reader.Read())
        {
            switch (reader.TokenType)
            {
                case JsonTokenType.EndArray:
                    return regions;
                case JsonTokenType.StartObject when regions.Count < MaxRegions:
                    if (ReadRegion(ref reader, regions.Count) is not { } region)
                    {
                        return null;
                    }

                    regions.Add(region);
                    break;
                case JsonTokenType.StartObject:
                    throw new PageServerException($"The handshake is refused: more than {MaxRegions} regions.");
                default:
                    throw new PageServerException($"The handshake is refused: region {regions.Count} is a {reader.TokenType}, not an object.");
            }
        }

        return null;
    }

    private static GuestRegion? ReadRegion(ref Utf8JsonReader reader, int index)
    {
        ulong? address = null, size = null, offset = null, pageSize = null, pageSizeKib = null;
        while (reader.Read())
        {
            if (reader.TokenType == JsonTokenType.EndObject)
            {
                return new GuestRegion(
                    address ?? throw Missing("base_host_virt_addr", index),
                    size ?? throw Missing("size", index),
                    offset ?? throw Missing("offset", index),
                    // Firecracker before 1.12 sends `page_size_kib` only, which holds bytes all the same; before huge pages, neither.
                    pageSize ?? pageSizeKib ?? GuestRegion.NormalPageSize);
            }

            string member = reader.GetString()!;
            ref ulong? target = ref pageSize;
            switch (member)
            {
                case "base_host_virt_addr": target = ref address; break;
                case "size": target = ref size; break;
                case "offset": target = ref offset; break;
                case "page_size": break;
                case "page_size_kib": target = ref pageSizeKib; break;
                default:
                    if (!reader.TrySkip())
                    {
                        return null;
                    }

                    continue;
            }

            if (!reader.Read())
            {
                return null;
            }

            target = reader.TokenType == JsonTokenType.Number && reader.TryGetUInt64(out ulong value)
                ? value
                : throw new PageServerException($"The handshake is refused: `{member}` of region {index} is no unsigned 64-bit number.");
        }

        return null;
    }

    private static PageServerException Missing(string member, int index) => new($"The handshake is refused: region {index} has no `{member}`.");
}
