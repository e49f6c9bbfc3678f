// What the parts of fake-firecracker share; main.c says what it is.
#ifndef FAKE_H
#define FAKE_H

#define _GNU_SOURCE
#include "../guest-memory.h"
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/un.h>

#define LENGTH(array) (sizeof(array) / sizeof *(array))

// ---- main.c: the script and the notes

// The version that the script plays, as MAJOR * 10000 + MINOR * 100 + PATCH.
extern int version;
extern const char *version_text, *snapshot_version, *instance_id;

// The value of the first line of the script with this name; NULL when there is none; "" when the line is the name alone.
const char *scripted(const char *name);
// The same for a line `NAME KEY VALUE`.
const char *scripted_for(const char *name, const char *key);
// Dies here when the script says so: `die STEP` by SIGKILL, `die STEP CODE` with that exit code.
void step(const char *name);
// One line to the notes beside the script: process, CLOCK_MONOTONIC in ns, text.
void note(const char *format, ...) __attribute__((format(printf, 1, 2)));
// One line of Firecracker's own log.
void log_line(const char *format, ...) __attribute__((format(printf, 1, 2)));
// "No such file or directory (os error 2)", as Rust shows an errno.
const char *os_error(int error);
// False when the path is longer than a socket's may be (107 bytes).
bool socket_address(struct sockaddr_un *address, const char *path);
// Connects to the guest beside the script; -1 when nobody plays one.
int connect_guest(void);
_Noreturn void broken(const char *what);

// ---- json.c

enum kind { STRING = 's', NUMBER = 'n', BOOLEAN = 'b', ZERO = 'z', OBJECT = 'o', ARRAY = 'a' };

struct field {
    char name[96];    // `mem_backend.backend_type`
    char text[1024];  // of strings, numbers and booleans
    enum kind kind;
    size_t name_end, value_end; // in bytes of the body
};

struct json {
    const char *body;
    struct field fields[40];
    int count;
    char error[512];
};

// What an endpoint takes. Since: the first version that knows the field.
struct known {
    const char *name;
    enum kind kind;
    bool required;
    int since;
};

bool json_parse(struct json *json, const char *body, size_t length);
// Checks the members of an object (of the whole body: prefix ""), the way serde does with deny_unknown_fields.
bool json_check(struct json *json, const char *prefix, const struct known *known, size_t count);
const struct field *json_find(const struct json *json, const char *name);
const char *json_string(const struct json *json, const char *name, const char *otherwise);
bool json_true(const struct json *json, const char *name);

// ---- http.c

enum { MAX_CONNECTIONS = 10, MAX_BODY = 51200 };

struct answer {
    int status;      // 204: no body
    char body[4096];
    bool fatal;      // the process exits with 1 once it is sent
    bool hang_up;    // no answer at all: end of file
    bool garbage;    // not HTTP
};

void http_listen(const char *path);
size_t http_watch(struct pollfd *watched);
void http_serve(const struct pollfd *watched);

// ---- requests.c

void handle_request(const char *method, const char *path, const char *body, size_t length, struct answer *answer);

enum state { NOT_STARTED, RUNNING, PAUSED };
extern enum state state;

// ---- memory.c

struct saved_devices {
    char vsock_path[108]; // "": none
    char drives[4][512];  // "": none
};

void memory_boot(size_t mib, bool huge);
// These return NULL, or what failed in Firecracker's words.
const char *memory_save(const char *state_path, const char *memory_path, bool full, const struct saved_devices *devices);
const char *memory_load_state(const char *state_path, struct saved_devices *devices);
const char *memory_map_file(const char *memory_path);
const char *memory_connect(const char *socket_path);
// Reads two guest pages on this thread, as restoring the virtio queues does.
void memory_touch_queues(void);
void memory_end_load(void);
void memory_inflate_balloon(size_t mib);

void vcpu_start(void);
void vcpu_pause(void);
void vcpu_resume(void);
extern bool restored;

// ---- vsock.c

const char *vsock_listen(const char *path);
size_t vsock_watch(struct pollfd *watched);
void vsock_serve(const struct pollfd *watched);
extern bool vsock_dead;

#endif
