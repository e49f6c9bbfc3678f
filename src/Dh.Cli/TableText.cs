using System.Globalization;
using System.Text;
using Dh.Guest;

namespace Dh.Cli;

/// <summary>A table as a terminal shows it: a line about it, then its first rows.</summary>
internal static class TableText
{
    /// <summary>The text, without a line break at its end.</summary>
    /// <param name="table">The table.</param>
    /// <param name="withMeta">Whether the first line says what it is: rows, whether it refreshes, columns and their types.</param>
    public static string Of(TablePreview table, bool withMeta)
    {
        string name = table.Name ?? "(result)";
        var text = new StringBuilder();
        if (withMeta)
        {
            string rows = table.RowCount is { } count ? string.Create(CultureInfo.InvariantCulture, $"{count} {(count == 1 ? "row" : "rows")}") : "rows unknown";
            string columns = string.Join(", ", table.Columns.Select(column => $"{column.Name}: {column.Type}"));
            text.Append(CultureInfo.InvariantCulture, $"{name}: {rows}, {(table.IsRefreshing ? "refreshing" : "static")}{(columns.Length > 0 ? $" ({columns})" : "")}\n");
        }

        text.Append(table.Preview ?? $"{name} cannot be shown: {table.Error ?? "the engine does not say why"}");
        return text.ToString().TrimEnd('\n');
    }
}
