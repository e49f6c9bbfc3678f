// The host's side of vsock: a socket in the working directory, on which a client says `CONNECT PORT`, hears `OK HOSTPORT`, and then talks
// to the guest. A refusal is end of file without a word.
#include "fake.h"

enum { MAX_CLIENTS = 32, CHUNK = 65536 };

enum stage { FREE, CONNECTING, ASKING, OPEN, STALLED };

struct flow {
    char bytes[CHUNK];
    size_t start, end;
};

static struct client {
    enum stage stage;
    int host, guest;
    char line[32];
    size_t line_length;
    struct flow to_guest, to_host;
} clients[MAX_CLIENTS];

bool vsock_dead;
static int listener = -1;
static int refusals;
static unsigned next_port = 1073741824;

const char *vsock_listen(const char *path)
{
    struct sockaddr_un address;
    // An empty path binds to a name that the kernel chooses, which nobody can find (unix(7), autobind): so does Firecracker.
    socklen_t length = *path ? sizeof address : sizeof address.sun_family;
    listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (listener >= 0 && socket_address(&address, path) && bind(listener, (struct sockaddr *)&address, length) == 0 && listen(listener, 128) == 0) {
        refusals = scripted_for("vsock", "refuse") ? atoi(scripted_for("vsock", "refuse")) : 0;
        return NULL;
    }
    static char failure[192];
    snprintf(failure, sizeof failure, "VsockUnixBackend: Error binding to the host-side Unix socket: %s", os_error(errno));
    return failure;
}

static void drop(struct client *client)
{
    close(client->host);
    if (client->guest >= 0)
        close(client->guest);
    client->stage = FREE;
}

static bool has_ended(int sock)
{
    struct pollfd on = { .fd = sock, .events = POLLRDHUP };
    return poll(&on, 1, 0) > 0 && (on.revents & (POLLRDHUP | POLLHUP | POLLERR));
}

static void say(struct client *client, const char *text)
{
    if (send(client->host, text, strlen(text), MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
        broken("send to a vsock client");
}

static void say_ok(struct client *client)
{
    char text[32];
    snprintf(text, sizeof text, "OK %u\n", next_port++);
    say(client, text);
}

static void take_connect(struct client *client)
{
    unsigned port;
    step("connect");
    note("vsock %s", client->line);
    if (vsock_dead || scripted_for("vsock", "silence")) {
        client->stage = STALLED;
    } else if (sscanf(client->line, "CONNECT %u", &port) != 1 || refusals-- > 0) {
        drop(client);
    } else if (scripted_for("vsock", "garbage")) {
        say(client, "HTTP/1.1 200 OK\r\n\r\n");
    } else if (state != RUNNING || scripted_for("vsock", "reset")) {
        // What stands behind the line is not read: closing with it unread is a reset (unix(7)).
        say_ok(client);
        drop(client);
    } else if ((client->guest = connect_guest()) < 0) {
        drop(client);
    } else {
        char text[64];
        int length = snprintf(text, sizeof text, "vsock %d %s %u\n", getpid(), restored ? "restored" : "booted", port);
        if (send(client->guest, text, length, MSG_NOSIGNAL) != length)
            drop(client);
        else
            client->stage = ASKING;
    }
}

// Byte by byte, as Firecracker does: what follows the line belongs to the guest.
static void read_line(struct client *client)
{
    char c;
    ssize_t count = recv(client->host, &c, 1, 0);
    if (count < 0 && errno == EAGAIN)
        return;
    if (count <= 0 || client->line_length + 1 == sizeof client->line) {
        drop(client);
    } else if (c != '\n') {
        client->line[client->line_length++] = c;
    } else {
        client->line[client->line_length] = '\0';
        take_connect(client);
    }
}

static void hear_guest(struct client *client)
{
    char text[4];
    if (recv(client->guest, text, sizeof text, MSG_WAITALL) != sizeof text || memcmp(text, "yes\n", sizeof text) != 0) {
        drop(client);
        return;
    }
    say_ok(client);
    client->stage = OPEN;
}

// Returns false at an end.
static bool pump(int from, int to, struct flow *flow)
{
    if (flow->start == flow->end) {
        ssize_t count = recv(from, flow->bytes, sizeof flow->bytes, MSG_DONTWAIT);
        if (count == 0 || (count < 0 && errno != EAGAIN))
            return false;
        flow->start = 0, flow->end = count < 0 ? 0 : count;
    }
    while (flow->start < flow->end) {
        ssize_t count = send(to, flow->bytes + flow->start, flow->end - flow->start, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0)
            return errno == EAGAIN;
        flow->start += count;
    }
    return true;
}

static void serve(struct client *client, short host, short guest)
{
    switch (client->stage) {
    case CONNECTING:
        if (host)
            read_line(client);
        break;
    case ASKING:
        if (guest)
            hear_guest(client);
        break;
    case OPEN:
        if (vsock_dead) {
            client->stage = STALLED;
        } else if ((host && !pump(client->host, client->guest, &client->to_guest)) || (guest && !pump(client->guest, client->host, &client->to_host))) {
            drop(client);
        } else if (host && has_ended(client->host)) {
            // shutdown(SHUT_WR) drops the reply that is under way; what came before it still reaches the guest.
            while (pump(client->host, client->guest, &client->to_guest) && client->to_guest.start < client->to_guest.end)
                poll(&(struct pollfd){ .fd = client->guest, .events = POLLOUT }, 1, 1000);
            drop(client);
        }
        break;
    case STALLED:
        if (host && has_ended(client->host))
            drop(client);
        break;
    case FREE:
        break;
    }
}

size_t vsock_watch(struct pollfd *watched)
{
    watched[0] = (struct pollfd){ .fd = listener, .events = POLLIN };
    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        struct client *client = &clients[i];
        bool open = client->stage == OPEN, held = open && state != RUNNING;
        struct pollfd host = { .fd = -1 }, guest = { .fd = -1 };
        if (client->stage != FREE && client->stage != ASKING && !held) {
            bool full = client->to_guest.start < client->to_guest.end;
            host = (struct pollfd){ .fd = client->host, .events = (client->stage == STALLED || full ? 0 : POLLIN) | POLLRDHUP };
            if (open && client->to_host.start < client->to_host.end)
                host.events |= POLLOUT;
        }
        if (client->stage == ASKING || (open && !held)) {
            guest = (struct pollfd){ .fd = client->guest, .events = client->to_host.start < client->to_host.end ? 0 : POLLIN };
            if (client->to_guest.start < client->to_guest.end)
                guest.events |= POLLOUT;
        }
        watched[1 + 2 * i] = host;
        watched[2 + 2 * i] = guest;
    }
    return 1 + 2 * MAX_CLIENTS;
}

void vsock_serve(const struct pollfd *watched)
{
    for (size_t i = 0; i < MAX_CLIENTS; i++) {
        // Room on one side is a reason to look at the flow from the other.
        short host = watched[1 + 2 * i].revents, guest = watched[2 + 2 * i].revents;
        serve(&clients[i], host | (guest & POLLOUT), guest | (host & POLLOUT));
    }
    if (watched[0].revents) {
        int accepted = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        for (size_t i = 0; accepted >= 0 && i < MAX_CLIENTS; i++) {
            if (clients[i].stage == FREE) {
                struct client *client = &clients[i];
                client->stage = CONNECTING, client->host = accepted, client->guest = -1, client->line_length = 0;
                client->to_guest.start = client->to_guest.end = client->to_host.start = client->to_host.end = 0;
                return;
            }
        }
        if (accepted >= 0)
            close(accepted);
    }
}
