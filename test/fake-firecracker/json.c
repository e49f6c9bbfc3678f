// A flat reader of small JSON objects. Its errors have serde_json's words, because Firecracker shows them.
#include "fake.h"
#include <ctype.h>

struct reader {
    struct json *json;
    const char *text;
    size_t at, length;
};

static void position(const char *text, size_t at, size_t *line, size_t *column)
{
    *line = 1, *column = 0;
    for (size_t i = 0; i < at; i++) {
        if (text[i] == '\n')
            (*line)++, *column = 0;
        else
            (*column)++;
    }
}

static bool wrong(struct json *json, size_t at, const char *format, ...)
{
    size_t line, column;
    position(json->body, at, &line, &column);
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(json->error, sizeof json->error, format, arguments);
    va_end(arguments);
    if ((size_t)length < sizeof json->error)
        snprintf(json->error + length, sizeof json->error - length, " at line %zu column %zu", line, column);
    return false;
}

static int peek(struct reader *r)
{
    while (r->at < r->length && strchr(" \t\r\n", r->text[r->at]) && r->text[r->at])
        r->at++;
    return r->at < r->length ? (unsigned char)r->text[r->at] : -1;
}

static bool read_string(struct reader *r, char *into, size_t size)
{
    size_t length = 0;
    for (r->at++; r->at < r->length && r->text[r->at] != '"'; r->at++) {
        char c = r->text[r->at];
        if ((unsigned char)c < ' ')
            return wrong(r->json, r->at + 1, "control character (\\u0000-\\u001F) found while parsing a string");
        if (c == '\\' && r->at + 1 < r->length) {
            c = r->text[++r->at];
            if (c == 'u') {
                c = (char)strtol((char[]){ r->text[r->at + 3], r->text[r->at + 4], 0 }, NULL, 16); // Latin is enough here
                r->at += 4;
            } else {
                const char *escaped = strchr("n\nt\tr\rb\bf\f", c);
                c = escaped && isalpha(c) ? escaped[1] : c;
            }
        }
        if (length + 1 < size)
            into[length++] = c;
    }
    into[length] = '\0';
    if (r->at >= r->length)
        return wrong(r->json, r->at, "EOF while parsing a string");
    r->at++;
    return true;
}

static bool read_value(struct reader *r, const char *name, struct field *field);

static bool read_members(struct reader *r, const char *prefix)
{
    r->at++;
    for (bool first = true; peek(r) != '}'; first = false) {
        if (peek(r) < 0)
            return wrong(r->json, r->at, "EOF while parsing an object");
        if (!first) {
            if (peek(r) != ',')
                return wrong(r->json, r->at + 1, "expected `,` or `}`");
            r->at++;
            if (peek(r) == '}')
                return wrong(r->json, r->at + 1, "trailing comma");
        }
        if (peek(r) != '"')
            return wrong(r->json, r->at + 1, "key must be a string");
        char key[64];
        if (!read_string(r, key, sizeof key))
            return false;
        if (r->json->count == (int)LENGTH(r->json->fields))
            return wrong(r->json, r->at, "more fields than this reader keeps");
        struct field *field = &r->json->fields[r->json->count++];
        snprintf(field->name, sizeof field->name, "%.31s%s%.63s", prefix, *prefix ? "." : "", key);
        field->name_end = r->at;
        if (peek(r) != ':')
            return wrong(r->json, r->at + 1, "expected `:`");
        r->at++;
        if (!read_value(r, field->name, field))
            return false;
    }
    r->at++;
    return true;
}

static bool read_value(struct reader *r, const char *name, struct field *field)
{
    int c = peek(r);
    if (c < 0)
        return wrong(r->json, r->at, "EOF while parsing a value");
    if (c == '"') {
        field->kind = STRING;
        if (!read_string(r, field->text, sizeof field->text))
            return false;
    } else if (c == '{') {
        field->kind = OBJECT;
        if (!read_members(r, name))
            return false;
    } else if (c == '[') {
        field->kind = ARRAY;
        r->at++;
        for (bool first = true; peek(r) != ']'; first = false) {
            static struct field item; // what stands in an array is read, not kept
            if (!first && (peek(r) != ',' || (r->at++, false)))
                return wrong(r->json, r->at + 1, "expected `,` or `]`");
            if (peek(r) == '{' ? !read_members(r, "[]") : !read_value(r, "[]", &item))
                return false;
        }
        r->at++;
    } else {
        size_t start = r->at;
        while (r->at < r->length && (isalnum((unsigned char)r->text[r->at]) || strchr("+-.", r->text[r->at])) && r->text[r->at])
            r->at++;
        snprintf(field->text, sizeof field->text, "%.*s", (int)(r->at - start), r->text + start);
        if (strcmp(field->text, "true") == 0 || strcmp(field->text, "false") == 0)
            field->kind = BOOLEAN;
        else if (strcmp(field->text, "null") == 0)
            field->kind = ZERO;
        else if (isdigit((unsigned char)*field->text) || *field->text == '-')
            field->kind = NUMBER;
        else
            return wrong(r->json, start + 1, "expected value");
    }
    field->value_end = r->at;
    return true;
}

bool json_parse(struct json *json, const char *body, size_t length)
{
    struct reader r = { json, body, 0, length };
    *json = (struct json){ .body = body };
    if (peek(&r) < 0)
        return wrong(json, r.at, "EOF while parsing a value");
    if (peek(&r) != '{')
        return wrong(json, r.at + 1, "expected value");
    if (!read_members(&r, ""))
        return false;
    return peek(&r) < 0 || wrong(json, r.at + 1, "trailing characters");
}

static bool is_member(const struct field *field, const char *prefix, const char **member)
{
    size_t length = strlen(prefix);
    *member = field->name + (length ? length + 1 : 0);
    return (length == 0 || (strncmp(field->name, prefix, length) == 0 && field->name[length] == '.')) && !strpbrk(*member, ".[");
}

static void list_known(const struct known *known, size_t count, char *into, size_t size)
{
    const char *names[32];
    size_t number = 0, at = 0;
    for (size_t i = 0; i < count; i++)
        if (version >= known[i].since)
            names[number++] = known[i].name;
    at += snprintf(into, size, "%s", number == 0 ? "there are no fields" : number > 2 ? "expected one of " : "expected ");
    for (size_t i = 0; i < number && at < size; i++)
        at += snprintf(into + at, size - at, "%s`%s`", i == 0 ? "" : number == 2 ? " or " : ", ", names[i]);
}

static const char *kind_name(enum kind kind)
{
    switch (kind) {
    case STRING: return "a string";
    case NUMBER: return "an integer";
    case BOOLEAN: return "a boolean";
    case OBJECT: return "a map";
    case ARRAY: return "a sequence";
    default: return "null";
    }
}

bool json_check(struct json *json, const char *prefix, const struct known *known, size_t count)
{
    size_t end = *prefix ? json_find(json, prefix)->value_end : strlen(json->body);
    for (int i = 0; i < json->count; i++) {
        const struct field *field = &json->fields[i];
        const char *member;
        if (!is_member(field, prefix, &member))
            continue;
        const struct known *match = NULL;
        for (size_t k = 0; k < count; k++)
            if (strcmp(known[k].name, member) == 0 && version >= known[k].since)
                match = &known[k];
        if (!match) {
            char list[384];
            list_known(known, count, list, sizeof list);
            return wrong(json, field->name_end, "unknown field `%s`, %s", member, list);
        }
        if (field->kind != match->kind && !(field->kind == ZERO && !match->required))
            return wrong(json, field->value_end, "invalid type: %s, expected %s", kind_name(field->kind), kind_name(match->kind));
        for (int j = 0; j < i; j++)
            if (strcmp(json->fields[j].name, field->name) == 0)
                return wrong(json, field->name_end, "duplicate field `%s`", member);
    }
    for (size_t k = 0; k < count; k++) {
        char name[128];
        snprintf(name, sizeof name, "%s%s%s", prefix, *prefix ? "." : "", known[k].name);
        if (known[k].required && !json_find(json, name))
            return wrong(json, end, "missing field `%s`", known[k].name);
    }
    return true;
}

const struct field *json_find(const struct json *json, const char *name)
{
    for (int i = 0; i < json->count; i++)
        if (strcmp(json->fields[i].name, name) == 0 && json->fields[i].kind != ZERO)
            return &json->fields[i];
    return NULL;
}

const char *json_string(const struct json *json, const char *name, const char *otherwise)
{
    const struct field *field = json_find(json, name);
    return field ? field->text : otherwise;
}

bool json_true(const struct json *json, const char *name)
{
    return strcmp(json_string(json, name, "false"), "true") == 0;
}
