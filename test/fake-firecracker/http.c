// HTTP/1.1 on the API socket, with the habits of Firecracker's server (micro_http): no reason phrases, ten connections, bodies of at most
// 51,200 bytes with a Content-Length, every connection kept, and a line feed inside the JSON of a parse error.
#include "fake.h"
#include <strings.h>

static int listener = -1;

static struct connection {
    int socket; // 0: free
    char buffer[MAX_BODY + 8192];
    size_t length;
} connections[MAX_CONNECTIONS];

void http_listen(const char *path)
{
    struct sockaddr_un address;
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener < 0 || !socket_address(&address, path) || bind(listener, (struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 128) != 0) {
        log_line("RunWithApiError error: Failed to open the API socket at: %s. Check that it is not already used.", path);
        log_line("Firecracker exiting with error. exit_code=1");
        exit(1);
    }
}

static void hang_up(struct connection *connection)
{
    close(connection->socket);
    *connection = (struct connection){ 0 };
}

static bool sending_is_over(int sock)
{
    struct pollfd on = { .fd = sock, .events = POLLRDHUP };
    return poll(&on, 1, 0) > 0 && (on.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

static void send_all(int sock, const char *bytes, size_t length)
{
    while (length > 0) {
        ssize_t sent = send(sock, bytes, length, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            poll(&(struct pollfd){ .fd = sock, .events = POLLOUT }, 1, 1000);
            continue;
        }
        if (sent < 0)
            return; // the client has gone: its right
        bytes += sent, length -= sent;
    }
}

static void reply(struct connection *connection, const struct answer *answer)
{
    char text[sizeof answer->body + 256];
    int length;
    if (answer->garbage)
        length = snprintf(text, sizeof text, "\x16\x03\x01 this is not HTTP\r\n\r\n");
    else if (answer->status == 204)
        length = snprintf(text, sizeof text, "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n");
    else
        length = snprintf(text, sizeof text,
            "HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
            answer->status, strlen(answer->body), answer->body);
    // A client that has ended its sending side loses the reply.
    if (answer->hang_up || sending_is_over(connection->socket))
        hang_up(connection);
    else
        send_all(connection->socket, text, length);
    if (answer->fatal) {
        log_line("Firecracker exiting with error. exit_code=1");
        exit(1);
    }
}

static void refuse(struct connection *connection, const char *reason)
{
    struct answer answer = { .status = 400 };
    snprintf(answer.body, sizeof answer.body, "{ \"error\": \"%s\nAll previous unanswered requests will be dropped.\" }", reason);
    connection->length = 0;
    reply(connection, &answer);
}

// Handles the request at the start of the buffer. Returns false when there is none yet, or none any more.
static bool take_request(struct connection *connection)
{
    char *end = memmem(connection->buffer, connection->length, "\r\n\r\n", 4);
    if (!end)
        return false;
    char head[8192];
    size_t head_length = end + 4 - connection->buffer;
    if (head_length >= sizeof head) {
        refuse(connection, "Invalid request.");
        return false;
    }
    memcpy(head, connection->buffer, head_length);
    head[head_length] = '\0';

    size_t body_length = 0;
    char reason[256], *rest;
    char *first = strtok_r(head, "\r\n", &rest);
    for (char *header; (header = strtok_r(NULL, "\r\n", &rest));) {
        if (strncasecmp(header, "Content-Length:", 15) == 0) {
            body_length = strtoul(header + 15, NULL, 10);
        } else if (strncasecmp(header, "Transfer-Encoding:", 18) == 0) {
            snprintf(reason, sizeof reason, "Invalid header. Reason: Unsupported value. Key:Transfer-Encoding; Value:%.32s", header + 18 + strspn(header + 18, " "));
            refuse(connection, reason);
            return false;
        }
    }
    char method[8] = "", path[512] = "", protocol[16] = "";
    if (!first || sscanf(first, "%7s %511s %15s", method, path, protocol) != 3 || strcmp(protocol, "HTTP/1.1") != 0) {
        refuse(connection, "Invalid HTTP Version.");
        return false;
    }
    if (strcmp(method, "GET") != 0 && strcmp(method, "PUT") != 0 && strcmp(method, "PATCH") != 0) {
        refuse(connection, "Invalid HTTP Method.");
        return false;
    }
    if (body_length > MAX_BODY) {
        snprintf(reason, sizeof reason, "Request payload with size %zu is larger than the limit of %d allowed by server.", body_length, MAX_BODY);
        refuse(connection, reason);
        return false;
    }
    if (connection->length < head_length + body_length)
        return false;

    char body[MAX_BODY + 1];
    memcpy(body, connection->buffer + head_length, body_length);
    body[body_length] = '\0';
    connection->length -= head_length + body_length;
    memmove(connection->buffer, connection->buffer + head_length + body_length, connection->length);

    struct answer answer = { .status = 204 };
    handle_request(method, path, body, body_length, &answer);
    reply(connection, &answer);
    if (answer.status == 204 && strcmp(path, "/snapshot/load") == 0)
        step("loaded");
    if (answer.status == 204 && strcmp(path, "/vm") == 0 && state == RUNNING)
        step("resumed");
    return connection->socket != 0;
}

static void receive(struct connection *connection)
{
    size_t room = sizeof connection->buffer - connection->length;
    ssize_t count = recv(connection->socket, connection->buffer + connection->length, room, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0) {
        hang_up(connection);
        return;
    }
    connection->length += count;
    while (take_request(connection))
        ;
}

static void accept_connection(void)
{
    static const char full[] = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }";
    int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (accepted < 0)
        return;
    for (size_t i = 0; i < LENGTH(connections); i++) {
        if (connections[i].socket == 0) {
            connections[i].socket = accepted;
            return;
        }
    }
    send_all(accepted, full, sizeof full - 1);
    close(accepted);
}

size_t http_watch(struct pollfd *watched)
{
    watched[0] = (struct pollfd){ .fd = listener, .events = POLLIN };
    for (size_t i = 0; i < LENGTH(connections); i++)
        watched[1 + i] = (struct pollfd){ .fd = connections[i].socket ? connections[i].socket : -1, .events = POLLIN };
    return 1 + LENGTH(connections);
}

void http_serve(const struct pollfd *watched)
{
    for (size_t i = 0; i < LENGTH(connections); i++)
        if (watched[1 + i].revents)
            receive(&connections[i]);
    if (watched[0].revents)
        accept_connection();
}
