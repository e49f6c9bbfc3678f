// Plays Firecracker for dh's tests: its command line, its API, its vsock socket, its handshake with a page server, with real guest memory
// and a real userfaultfd. It cannot run a guest's code: the guest is played by whoever listens on `guest.sock` beside the program.
//
//   firecracker --api-sock PATH [--id ID] | --no-api --config-file PATH | --version | --snapshot-version | --describe-snapshot PATH
//
// One thread answers everything, as Firecracker's does: while a load waits for a guest page, nothing is answered. A second thread plays the
// virtual CPU. Beside the program lie
//   script       optional; lines that say what to play (below); read when the program starts
//   guest.sock   where the guest is played: the program connects, and says as what
//                  `vcpu PID booted|restored`   then obeys `check OFFSET LENGTH` (answers `checked PAGES DIFFERING`: against what the memory
//                                               held when the snapshot was taken), `write OFFSET LENGTH`, `remove OFFSET LENGTH`, `die SIGNAL`
//                  `vsock PID booted|restored PORT`   a connection from the host: `yes` takes it, and then it is that connection's bytes
//   notes        written: `PID NANOSECONDS TEXT` (CLOCK_MONOTONIC), each request as it is taken
//
// The script:
//   version 1.16.1          whose habits to have (default 1.16.1); snapshot-version 10.0.0 overrides what belongs to it
//   split MIB...            how large guest memory's regions are, but for the last
//   die STEP [CODE]         SIGKILL, or exit with CODE, at: start, listen, load, handshake, populating, loaded, resume, resumed, connect
//   slow-accept MS          listens, but does nothing for so long
//   fail PATH TEXT          answers 400 with this fault to requests on PATH; `fatal`: and exits with 1, as a load that failed does
//   eof PATH | garbage PATH | silence PATH      hangs up; answers what is not HTTP; stalls for ever
//   vsock refuse N | reset | garbage | silence  refuses the first N connections; breaks each; answers CONNECT wrongly; never answers it
//   no-seccomp              has no system-call filters, as one that was started with --no-seccomp
//   no-boot TEXT            the kernel of a machine without an API does not boot, but says this; else init says that it was probed, and ends
//   leftover NAME           makes a socket with this name before anything else, as an earlier run leaves one behind
#include "fake.h"
#include <libgen.h>
#include <limits.h>
#include <signal.h>
#include <time.h>

int version;
const char *version_text, *snapshot_version, *instance_id = "anonymous-instance";

static char directory[PATH_MAX];
static char script_text[8192];
static char *script_lines[64];
static int script_count;

void broken(const char *what)
{
    fprintf(stderr, "fake-firecracker: %s: %s\n", what, strerror(errno));
    exit(70);
}

static const char *beside(const char *name)
{
    static _Thread_local char path[PATH_MAX + 32];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static void read_script(void)
{
    ssize_t length = readlink("/proc/self/exe", directory, sizeof directory - 1);
    if (length < 0)
        broken("readlink /proc/self/exe");
    dirname(directory);
    FILE *file = fopen(beside("script"), "re");
    if (!file && errno != ENOENT)
        broken("open script");
    if (file) {
        script_text[fread(script_text, 1, sizeof script_text - 1, file)] = '\0';
        fclose(file);
    }
    char *rest;
    for (char *line = strtok_r(script_text, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (script_count == LENGTH(script_lines)) {
            errno = E2BIG;
            broken("script");
        }
        script_lines[script_count++] = line;
    }
}

static const char *after(const char *line, const char *word)
{
    size_t length = strlen(word);
    if (strncmp(line, word, length) != 0 || (line[length] != ' ' && line[length] != '\0'))
        return NULL;
    return line[length] ? line + length + 1 : line + length;
}

const char *scripted(const char *name)
{
    for (int i = 0; i < script_count; i++) {
        const char *value = after(script_lines[i], name);
        if (value)
            return value;
    }
    return NULL;
}

const char *scripted_for(const char *name, const char *key)
{
    for (int i = 0; i < script_count; i++) {
        const char *value = after(script_lines[i], name);
        if (value && (value = after(value, key)))
            return value;
    }
    return NULL;
}

void step(const char *name)
{
    const char *code = scripted_for("die", name);
    if (!code)
        return;
    printf("[    0.424242] the script ends this at: %s\n", name);
    fflush(stdout);
    if (*code)
        exit(atoi(code));
    raise(SIGKILL);
}

void note(const char *format, ...)
{
    static int notes = -1;
    if (notes < 0)
        notes = open(beside("notes"), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    char text[4096];
    int length = snprintf(text, sizeof text, "%d %lld ", getpid(), now.tv_sec * 1000000000LL + now.tv_nsec);
    va_list arguments;
    va_start(arguments, format);
    length += vsnprintf(text + length, sizeof text - length - 1, format, arguments);
    va_end(arguments);
    if (length > (int)sizeof text - 2)
        length = sizeof text - 2;
    text[length++] = '\n';
    if (notes < 0 || write(notes, text, length) != length)
        broken("write notes");
}

void log_line(const char *format, ...)
{
    char when[32];
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    strftime(when, sizeof when, "%FT%T", gmtime(&now.tv_sec));
    printf("%s.%09ld [%s:main] ", when, now.tv_nsec, instance_id);
    va_list arguments;
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    putchar('\n');
    fflush(stdout);
}

const char *os_error(int error)
{
    static char text[128];
    snprintf(text, sizeof text, "%s (os error %d)", strerror(error), error);
    return text;
}

bool socket_address(struct sockaddr_un *address, const char *path)
{
    size_t length = strlen(path);
    *address = (struct sockaddr_un){ .sun_family = AF_UNIX };
    if (length >= sizeof address->sun_path)
        return false;
    memcpy(address->sun_path, path, length);
    return true;
}

int connect_guest(void)
{
    struct sockaddr_un address;
    int guest = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (guest >= 0 && (!socket_address(&address, beside("guest.sock")) || connect(guest, (struct sockaddr *)&address, sizeof address) != 0)) {
        close(guest);
        return -1;
    }
    return guest;
}

static void play_version(void)
{
    // Real runs for 1.13 to 1.17; what 1.10 to 1.12 have is from the history of Firecracker's snapshot format.
    static const struct { int since; const char *format; } formats[] = {
        { 11700, "11.0.0" }, { 11600, "10.0.0" }, { 11500, "9.0.0" }, { 11300, "8.0.0" }, { 11200, "6.0.0" }, { 11100, "5.0.0" }, { 0, "4.0.0" },
    };
    int major = 0, minor = 0, patch = 0;
    version_text = scripted("version");
    if (!version_text)
        version_text = "1.16.1";
    sscanf(version_text, "%d.%d.%d", &major, &minor, &patch);
    version = major * 10000 + minor * 100 + patch;
    snapshot_version = scripted("snapshot-version");
    for (size_t i = 0; !snapshot_version; i++)
        if (version >= formats[i].since)
            snapshot_version = formats[i].format;
}

static _Noreturn void describe(const char *path)
{
    struct saved_devices devices;
    const char *failure = memory_load_state(path, &devices);
    if (failure) {
        log_line("RunWithoutApiError error: %s", failure);
        log_line("Firecracker exiting with error. exit_code=1");
        exit(1);
    }
    printf("v%s\n", snapshot_version);
    log_line("Firecracker exiting successfully. exit_code=0");
    exit(0);
}

// A machine from a file, without an API: its guest is the init that only shows that the kernel has booted.
static _Noreturn void boot_file(const char *path)
{
    static char text[65536];
    FILE *file = fopen(path, "re");
    if (!file) {
        log_line("RunWithoutApiError error: Unable to open or read from the configuration file: %s", os_error(errno));
        exit(1);
    }
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    note("boot %s", text);
    if (scripted("no-boot"))
        printf("%s\n", scripted("no-boot"));
    else if (strstr(text, "dh.probe"))
        printf("dh-probe: booted\n");
    log_line("Firecracker exiting successfully. exit_code=0");
    exit(0);
}

// Returns the API socket's path.
static const char *parse(int argc, char **argv)
{
    static const char *const ignored[] = { "--log-path", "--level", "--metrics-path", "--http-api-max-payload-size", "--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us" };
    const char *api = "/run/firecracker.socket";
    for (int i = 1; i < argc; i++) {
        bool has_value = i + 1 < argc;
        if (strcmp(argv[i], "--version") == 0) {
            printf("Firecracker v%s\n\n", version_text);
            log_line("Firecracker exiting successfully. exit_code=0");
            exit(0);
        } else if (strcmp(argv[i], "--snapshot-version") == 0) {
            printf("v%s\n", snapshot_version);
            log_line("Firecracker exiting successfully. exit_code=0");
            exit(0);
        } else if (strcmp(argv[i], "--describe-snapshot") == 0 && has_value) {
            describe(argv[i + 1]);
        } else if (strcmp(argv[i], "--config-file") == 0 && has_value) {
            boot_file(argv[i + 1]);
        } else if (strcmp(argv[i], "--api-sock") == 0 && has_value) {
            api = argv[++i];
        } else if (strcmp(argv[i], "--id") == 0 && has_value) {
            instance_id = argv[++i];
        } else if (strcmp(argv[i], "--no-api") == 0 || strcmp(argv[i], "--no-seccomp") == 0 || strcmp(argv[i], "--show-level") == 0 || strcmp(argv[i], "--boot-timer") == 0) {
            continue;
        } else {
            bool known = false;
            for (size_t k = 0; k < LENGTH(ignored); k++)
                known |= strcmp(argv[i], ignored[k]) == 0;
            if (!known || !has_value) {
                fprintf(stderr, "Arguments parsing error: Found argument '%s' which wasn't expected, or isn't valid in this context.\n\nFor more information try --help.\n", argv[i]);
                exit(153);
            }
            i++;
        }
    }
    return api;
}

static void leave_behind(const char *name)
{
    struct sockaddr_un address;
    int left = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (left < 0 || !socket_address(&address, name) || bind(left, (struct sockaddr *)&address, sizeof address) != 0)
        broken(name);
    close(left);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    read_script();
    play_version();
    const char *api = parse(argc, argv);
    log_line("Running Firecracker v%s", version_text);
    step("start");
    if (scripted("leftover"))
        leave_behind(scripted("leftover"));
    http_listen(api);
    note("listening");
    step("listen");
    if (scripted("slow-accept"))
        usleep(atoi(scripted("slow-accept")) * 1000);
    for (;;) {
        struct pollfd watched[128];
        size_t http = http_watch(watched), vsock = vsock_watch(watched + http);
        if (poll(watched, http + vsock, -1) < 0)
            broken("poll");
        http_serve(watched);
        vsock_serve(watched + http);
    }
}
