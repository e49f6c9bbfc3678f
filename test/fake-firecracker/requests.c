// What each request does:
//
//   not started --InstanceStart--> running <--Paused / Resumed--> paused
//        |                                                          ^
//        +--/snapshot/load (nothing may be configured before)-------+
//
// On 1.16.x a `Resumed` that does not directly follow a load or a snapshot answers 204 and ends vsock from the host for good.
#include "fake.h"

enum state state;

static bool configured;       // for a boot
static bool resumable;        // a load or a snapshot came last
static struct saved_devices devices;
static size_t memory_mib = 128;
static bool huge_pages;
static char kernel[1024];

#define MINOR(number) (10000 + (number) * 100)

static const struct known load_fields[] = {
    { "snapshot_path", STRING, true, 0 }, { "mem_backend", OBJECT, false, MINOR(1) }, { "mem_file_path", STRING, false, 0 },
    { "enable_diff_snapshots", BOOLEAN, false, 0 }, { "track_dirty_pages", BOOLEAN, false, MINOR(13) }, { "resume_vm", BOOLEAN, false, 0 },
    { "network_overrides", ARRAY, false, MINOR(12) }, { "vsock_override", OBJECT, false, MINOR(16) }, { "clock_realtime", BOOLEAN, false, MINOR(16) },
    { "huge_pages", STRING, false, MINOR(17) },
};
static const struct known backend_fields[] = { { "backend_type", STRING, true, 0 }, { "backend_path", STRING, true, 0 } };
static const struct known override_fields[] = { { "uds_path", STRING, true, 0 } };
static const struct known create_fields[] = { { "snapshot_type", STRING, false, 0 }, { "snapshot_path", STRING, true, 0 }, { "mem_file_path", STRING, true, 0 } };
static const struct known machine_fields[] = {
    { "vcpu_count", NUMBER, true, 0 }, { "mem_size_mib", NUMBER, true, 0 }, { "smt", BOOLEAN, false, 0 }, { "cpu_template", STRING, false, 0 },
    { "track_dirty_pages", BOOLEAN, false, 0 }, { "huge_pages", STRING, false, MINOR(7) },
};
static const struct known boot_fields[] = { { "kernel_image_path", STRING, true, 0 }, { "initrd_path", STRING, false, 0 }, { "boot_args", STRING, false, 0 } };
static const struct known vsock_fields[] = { { "vsock_id", STRING, false, 0 }, { "guest_cid", NUMBER, true, 0 }, { "uds_path", STRING, true, 0 } };
static const struct known drive_fields[] = {
    { "drive_id", STRING, true, 0 }, { "partuuid", STRING, false, 0 }, { "is_root_device", BOOLEAN, true, 0 }, { "cache_type", STRING, false, 0 },
    { "is_read_only", BOOLEAN, false, 0 }, { "path_on_host", STRING, false, 0 }, { "rate_limiter", OBJECT, false, 0 }, { "io_engine", STRING, false, 0 },
    { "socket", STRING, false, MINOR(5) },
};
static const struct known drive_patch_fields[] = { { "drive_id", STRING, true, 0 }, { "path_on_host", STRING, false, 0 }, { "rate_limiter", OBJECT, false, 0 } };
static const struct known balloon_fields[] = {
    { "amount_mib", NUMBER, true, 0 }, { "deflate_on_oom", BOOLEAN, true, 0 }, { "stats_polling_interval_s", NUMBER, false, 0 },
    { "free_page_hinting", BOOLEAN, false, MINOR(14) }, { "free_page_reporting", BOOLEAN, false, MINOR(14) },
};
static const struct known balloon_patch_fields[] = { { "amount_mib", NUMBER, true, 0 } };
static const struct known entropy_fields[] = { { "rate_limiter", OBJECT, false, 0 } };
static const struct known action_fields[] = { { "action_type", STRING, true, 0 } };
static const struct known state_fields[] = { { "state", STRING, true, 0 } };

static void fail(struct answer *answer, const char *format, ...)
{
    char text[2048];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    answer->status = 400;
    size_t at = snprintf(answer->body, sizeof answer->body, "{\"fault_message\":\"");
    for (const char *c = text; *c; c++) {
        if (*c == '"' || *c == '\\')
            answer->body[at++] = '\\';
        answer->body[at++] = *c;
    }
    snprintf(answer->body + at, sizeof answer->body - at, "\"}");
}

static void say(struct answer *answer, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(answer->body, sizeof answer->body, format, arguments);
    va_end(arguments);
    answer->status = 200;
}

static void fail_json(struct answer *answer, const char *error)
{
    fail(answer, "An error occurred when deserializing the json body of a request: %s.", error);
}

static bool check(struct json *json, const char *prefix, const struct known *known, size_t count, struct answer *answer)
{
    if (json_check(json, prefix, known, count))
        return true;
    fail_json(answer, json->error);
    return false;
}

static bool check_variant(const struct json *json, const char *name, const char *const *variants, const char *list, struct answer *answer)
{
    const struct field *field = json_find(json, name);
    for (; field && *variants; variants++)
        if (strcmp(field->text, *variants) == 0)
            return true;
    if (!field)
        return true;
    char error[256];
    snprintf(error, sizeof error, "unknown variant `%.64s`, expected %s at line 1 column %zu", field->text, list, field->value_end);
    fail_json(answer, error);
    return false;
}

// ---- snapshots

static void fail_load(struct answer *answer, const char *why)
{
    fail(answer, "Load snapshot error: Failed to restore from snapshot: %s", why);
    answer->fatal = true;
}

static void restore(const struct json *json, struct answer *answer)
{
    const char *failure = memory_load_state(json_string(json, "snapshot_path", ""), &devices);
    bool uffd = strcmp(json_string(json, "mem_backend.backend_type", "File"), "Uffd") == 0;
    const char *path = json_string(json, "mem_backend.backend_path", json_string(json, "mem_file_path", ""));
    if (!failure)
        failure = uffd ? memory_connect(path) : memory_map_file(path);
    if (!failure && uffd)
        step("handshake");
    for (size_t i = 0; !failure && i < LENGTH(devices.drives); i++) {
        static char text[640];
        if (*devices.drives[i] && access(devices.drives[i], R_OK) != 0) {
            snprintf(text, sizeof text, "Failed to build microVM from snapshot: Failed to restore MMIO device: VirtioBackend: Error manipulating the backing file: %s %s", os_error(errno), devices.drives[i]);
            failure = text;
        }
    }
    const char *vsock_path = json_string(json, "vsock_override.uds_path", devices.vsock_path);
    if (!failure && (*devices.vsock_path || json_find(json, "vsock_override"))) {
        static char text[320];
        failure = vsock_listen(vsock_path);
        if (failure) {
            snprintf(text, sizeof text, "Failed to build microVM from snapshot: Failed to restore MMIO device: %s", failure);
            failure = text;
        } else {
            snprintf(devices.vsock_path, sizeof devices.vsock_path, "%s", vsock_path);
        }
    }
    if (failure) {
        fail_load(answer, failure);
        return;
    }
    memory_touch_queues();
    memory_end_load();
    vcpu_pause();
    vcpu_start();
    state = PAUSED;
    resumable = true;
    if (json_true(json, "resume_vm")) {
        state = RUNNING;
        resumable = false;
        vcpu_resume();
    }
}

static void load_snapshot(struct json *json, struct answer *answer)
{
    static const char *const types[] = { "File", "Uffd", NULL };
    static const char *const pages[] = { "Snapshot", "None", "Transparent", "2M", NULL };
    bool backend = json_find(json, "mem_backend"), file = json_find(json, "mem_file_path");
    if (!check(json, "", load_fields, LENGTH(load_fields), answer)
        || (backend && (!check(json, "mem_backend", backend_fields, LENGTH(backend_fields), answer) || !check_variant(json, "mem_backend.backend_type", types, "`File` or `Uffd`", answer)))
        || (json_find(json, "vsock_override") && !check(json, "vsock_override", override_fields, LENGTH(override_fields), answer))
        || !check_variant(json, "huge_pages", pages, "one of `Snapshot`, `None`, `Transparent`, `2M`", answer))
        return;
    if (backend && file)
        fail_json(answer, "too many fields: either `mem_backend` or `mem_file_path` exclusively is required");
    else if (!backend && !file)
        fail_json(answer, version < MINOR(1) ? "missing field `mem_file_path` at line 1 column 1" : "missing field: either `mem_backend` or `mem_file_path` is required");
    else if (state != NOT_STARTED)
        fail(answer, "The requested operation is not supported after starting the microVM.");
    else if (configured)
        fail(answer, "Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.");
    else
        restore(json, answer);
}

static void create_snapshot(struct json *json, struct answer *answer)
{
    static const char *const types[] = { "Full", "Diff", NULL };
    if (!check(json, "", create_fields, LENGTH(create_fields), answer) || !check_variant(json, "snapshot_type", types, "`Full` or `Diff`", answer))
        return;
    if (state == NOT_STARTED) {
        fail(answer, "The requested operation is not supported before starting the microVM.");
    } else if (state == RUNNING) {
        fail(answer, "Create snapshot error: Cannot save the microVM state: Operation not allowed: save/restore unavailable while running");
    } else {
        bool full = strcmp(json_string(json, "snapshot_type", "Full"), "Full") == 0;
        const char *failure = memory_save(json_string(json, "snapshot_path", ""), json_string(json, "mem_file_path", ""), full, &devices);
        if (failure)
            fail(answer, "Create snapshot error: %s", failure);
        else
            resumable = true;
    }
}

// ---- the machine

static void start_instance(struct answer *answer)
{
    unsigned char magic[4] = { 0 };
    int file = open(kernel, O_RDONLY | O_CLOEXEC);
    ssize_t count = file < 0 ? 0 : read(file, magic, sizeof magic);
    if (file >= 0)
        close(file);
    if (state != NOT_STARTED) {
        fail(answer, "The requested operation is not supported after starting the microVM.");
    } else if (!*kernel) {
        fail(answer, "Start microvm error: Cannot start microvm without kernel configuration.");
    } else if (version < MINOR(17) && (count != 4 || memcmp(magic, "\x7f" "ELF", 4) != 0)) {
        fail(answer, "Start microvm error: Cannot load kernel due to invalid memory configuration or invalid kernel image: Kernel Loader: failed to load ELF kernel image");
    } else {
        const char *failure = *devices.vsock_path ? vsock_listen(devices.vsock_path) : NULL;
        if (failure) {
            fail(answer, "Start microvm error: Cannot create vsock device: %s", failure);
            return;
        }
        memory_boot(memory_mib, huge_pages);
        state = RUNNING;
        vcpu_start();
    }
}

static void act(struct json *json, struct answer *answer)
{
    static const char *const types[] = { "FlushMetrics", "InstanceStart", "SendCtrlAltDel", NULL };
    if (!check(json, "", action_fields, LENGTH(action_fields), answer)
        || !check_variant(json, "action_type", types, "one of `FlushMetrics`, `InstanceStart`, `SendCtrlAltDel`", answer))
        return;
    if (strcmp(json_string(json, "action_type", ""), "InstanceStart") == 0)
        start_instance(answer);
    else if (state == NOT_STARTED)
        fail(answer, "The requested operation is not supported before starting the microVM.");
}

static void change_state(struct json *json, struct answer *answer)
{
    static const char *const states[] = { "Paused", "Resumed", NULL };
    if (!check(json, "", state_fields, LENGTH(state_fields), answer) || !check_variant(json, "state", states, "`Paused` or `Resumed`", answer))
        return;
    if (state == NOT_STARTED) {
        fail(answer, "The requested operation is not supported before starting the microVM.");
    } else if (strcmp(json_string(json, "state", ""), "Paused") == 0) {
        if (state == RUNNING)
            vcpu_pause();
        state = PAUSED;
        resumable = false;
    } else {
        step("resume");
        if (!resumable && version >= MINOR(16) && version < MINOR(17))
            vsock_dead = true;
        resumable = false;
        if (state == PAUSED)
            vcpu_resume();
        state = RUNNING;
    }
}

// What is configured for a boot. Firecracker looks at the files now, not at the start.
static void configure(const char *path, struct json *json, struct answer *answer)
{
    if (strcmp(path, "/machine-config") == 0) {
        if (!check(json, "", machine_fields, LENGTH(machine_fields), answer))
            return;
        memory_mib = strtoul(json_string(json, "mem_size_mib", "0"), NULL, 10);
        huge_pages = strcmp(json_string(json, "huge_pages", "None"), "2M") == 0;
        if (memory_mib == 0)
            fail(answer, "The memory size (MiB) is either 0, or not a multiple of the configured page size.");
    } else if (strcmp(path, "/boot-source") == 0) {
        if (!check(json, "", boot_fields, LENGTH(boot_fields), answer))
            return;
        const char *initrd = json_string(json, "initrd_path", "");
        snprintf(kernel, sizeof kernel, "%s", json_string(json, "kernel_image_path", ""));
        if (access(kernel, R_OK) != 0)
            fail(answer, "Boot source error: The kernel file cannot be opened: %s", os_error(errno));
        else if (*initrd && access(initrd, R_OK) != 0)
            fail(answer, "Boot source error: The initrd file cannot be opened due to invalid path or invalid permissions. %s", os_error(errno));
    } else if (strcmp(path, "/vsock") == 0) {
        if (check(json, "", vsock_fields, LENGTH(vsock_fields), answer))
            snprintf(devices.vsock_path, sizeof devices.vsock_path, "%s", json_string(json, "uds_path", ""));
    } else if (strcmp(path, "/balloon") == 0) {
        check(json, "", balloon_fields, LENGTH(balloon_fields), answer);
    } else if (strcmp(path, "/entropy") == 0) {
        check(json, "", entropy_fields, LENGTH(entropy_fields), answer);
    } else {
        if (!check(json, "", drive_fields, LENGTH(drive_fields), answer))
            return;
        const char *disk = json_string(json, "path_on_host", "");
        size_t slot = 0;
        while (slot + 1 < LENGTH(devices.drives) && *devices.drives[slot])
            slot++;
        snprintf(devices.drives[slot], sizeof devices.drives[slot], "%s", disk);
        if (access(disk, json_true(json, "is_read_only") ? R_OK : R_OK | W_OK) != 0)
            fail(answer, "Drive config error: Unable to open block device: Error manipulating the backing file: %s %s", os_error(errno), disk);
    }
}

static void change_balloon(struct json *json, struct answer *answer)
{
    if (!check(json, "", balloon_patch_fields, LENGTH(balloon_patch_fields), answer))
        return;
    if (state == NOT_STARTED)
        fail(answer, "The requested operation is not supported before starting the microVM.");
    else
        memory_inflate_balloon(strtoul(json_string(json, "amount_mib", "0"), NULL, 10));
}

static bool is_configuration(const char *path)
{
    static const char *const paths[] = { "/machine-config", "/boot-source", "/vsock", "/balloon", "/entropy" };
    for (size_t i = 0; i < LENGTH(paths); i++)
        if (strcmp(path, paths[i]) == 0)
            return true;
    return strncmp(path, "/drives/", 8) == 0;
}

static void put(const char *path, struct json *json, struct answer *answer)
{
    if (strcmp(path, "/snapshot/load") == 0) {
        load_snapshot(json, answer);
    } else if (strcmp(path, "/snapshot/create") == 0) {
        create_snapshot(json, answer);
    } else if (strcmp(path, "/actions") == 0) {
        act(json, answer);
    } else if (is_configuration(path)) {
        if (state != NOT_STARTED) {
            fail(answer, "The requested operation is not supported after starting the microVM.");
            return;
        }
        configure(path, json, answer);
        configured |= answer->status == 204;
    } else if (strcmp(path, "/logger") != 0 && strcmp(path, "/metrics") != 0) {
        fail(answer, "Invalid request method and/or path: PUT %s.", path + 1);
    }
}

static void patch(const char *path, struct json *json, struct answer *answer)
{
    if (strcmp(path, "/vm") == 0)
        change_state(json, answer);
    else if (strcmp(path, "/balloon") == 0)
        change_balloon(json, answer);
    else if (strncmp(path, "/drives/", 8) == 0)
        check(json, "", drive_patch_fields, LENGTH(drive_patch_fields), answer);
    else
        fail(answer, "Invalid request method and/or path: PATCH %s.", path + 1);
}

static void get(const char *path, struct answer *answer)
{
    static const char *const names[] = { "Not started", "Running", "Paused" };
    if (strcmp(path, "/") == 0)
        say(answer, "{\"id\":\"%s\",\"state\":\"%s\",\"vmm_version\":\"%s\",\"app_name\":\"Firecracker\"}", instance_id, names[state], version_text);
    else if (strcmp(path, "/version") == 0)
        say(answer, "{\"firecracker_version\":\"%s\"}", version_text);
    else
        fail(answer, "Invalid request method and/or path: GET %s.", path + 1);
}

// Faults that the script injects. Returns true when it has answered.
static bool play_fault(const char *path, struct answer *answer)
{
    const char *text;
    if (scripted_for("silence", path)) {
        for (;;)
            pause();
    }
    if ((text = scripted_for("fatal", path)) || (text = scripted_for("fail", path))) {
        fail(answer, "%s", text);
        answer->fatal = scripted_for("fatal", path);
        return true;
    }
    answer->hang_up = scripted_for("eof", path);
    answer->garbage = scripted_for("garbage", path);
    return answer->hang_up || answer->garbage;
}

void handle_request(const char *method, const char *path, const char *body, size_t length, struct answer *answer)
{
    note("%s %s %.*s", method, path, (int)length, body);
    if (strcmp(path, "/snapshot/load") == 0)
        step("load");
    if (play_fault(path, answer))
        return;
    if (strcmp(method, "GET") == 0) {
        if (length > 0)
            fail(answer, "GET request cannot have a body.");
        else
            get(path, answer);
        return;
    }
    struct json json;
    if (length == 0)
        fail(answer, "Empty %s request.", method);
    else if (!json_parse(&json, body, length))
        fail_json(answer, json.error);
    else if (strcmp(method, "PUT") == 0)
        put(path, &json, answer);
    else
        patch(path, &json, answer);
}
