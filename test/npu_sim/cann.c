/* The parts of the CANN runtime (libascendcl, libhccl, libopapi, ...) that torch_npu calls, over host memory.
 *
 * Device memory is host memory, a copy is a memmove, a stream has always caught up, an event is a reading of the clock,
 * and a collective goes through POSIX shared memory between the processes of one machine. Operators are not here:
 * npu_sim.py runs them as CPU operators over the same bytes. What is neither here nor there fails by its name:
 * link-time names get a failing stub from build.py, names looked up at run time are absent (an older CANN).
 *
 * Environment: NPU_SIM (devices), NPU_SIM_SOC, ASCEND_RT_VISIBLE_DEVICES, HCCL_CONNECT_TIMEOUT and HCCL_EXEC_TIMEOUT (s).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, NOT_SUPPORTED = 207000, BAD_DEVICE = 107001, OUT_OF_MEMORY = 207001 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* ---- counters and the last error: npu_sim.py reads them ---- */
#define NAMES 256
typedef struct { const char *name; uint64_t calls, bytes; } Counter;
static Counter counters[NAMES];
static _Atomic int lock;
/* `name` is GROUP.NAME, kept by address: a literal, or never freed. Groups: sync hccl kernel unimplemented refused. */
static void count(const char *name, uint64_t bytes) {
  while (atomic_exchange(&lock, 1)) {}
  int i = 0;
  while (i < NAMES - 1 && counters[i].name && strcmp(counters[i].name, name)) i++;
  counters[i].name = name;
  counters[i].calls++;
  counters[i].bytes += bytes;
  atomic_store(&lock, 0);
}
Counter *npu_sim_counters(void) { return counters; }

static char last_error[1024] = "";
const char *aclGetRecentErrMsg(void) { return last_error; }
static int fail(int code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(last_error, sizeof last_error, format, args);
  va_end(args);
  return code;
}
int npu_sim_unimplemented(const char *name) {
  char *key;
  if (asprintf(&key, "unimplemented.%s", name) > 0) count(key, 0);
  fprintf(stderr, "simulated NPU: %s is not implemented\n", name);
  return fail(NOT_SUPPORTED, "simulated NPU: %s is not implemented", name);
}

/* ---- devices ---- */
static _Thread_local int32_t current_device = 0;
static uint32_t device_count(void) {
  const char *all = getenv("NPU_SIM"), *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");
  uint32_t physical = all ? atoi(all) : 0, n = 0;
  if (!visible) return physical;
  for (const char *p = visible; *p; n++) { /* like the driver, stop at the first id that is not a device */
    char *end;
    unsigned long id = strtoul(p, &end, 10);
    if (end == p || id >= physical) break;
    p = *end == ',' ? end + 1 : end;
  }
  return n;
}
int aclrtGetDeviceCount(uint32_t *n) { *n = device_count(); return OK; }
int aclrtGetDevice(int32_t *d) { *d = current_device; return OK; }
int aclrtSetDevice(int32_t d) {
  int32_t n = device_count();
  if (d < 0 || d >= n) return fail(BAD_DEVICE, "simulated NPU: device %d of %d", d, n);
  current_device = d;
  return OK;
}
int aclrtGetCurrentContext(void **c) { *c = (void *)0x10; return OK; }
int aclrtGetPrimaryCtxState(int32_t d, uint32_t *flags, int32_t *active) { *active = 1; return OK; }
int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) { *logic = user; return OK; }
const char *aclrtGetSocName(void) { const char *s = getenv("NPU_SIM_SOC"); return s ? s : "Ascend910B2"; }
int aclGetDeviceCapability(uint32_t d, int info, int64_t *v) { *v = 1; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t a, int32_t b) { *can = 1; return OK; }
int aclrtDeviceGetBareTgid(int32_t *pid) { *pid = getpid(); return OK; }

/* ---- memory ---- */
static uint64_t hbm(void) { return (strcmp(aclrtGetSocName(), "Ascend910A") ? 64ull : 32ull) << 30; }
static _Atomic int64_t used; /* by this process, on all its devices */
static int out_of_memory(void) { return fail(OUT_OF_MEMORY, "simulated NPU: out of memory"); }
static int get_memory(void **p, size_t n) { /* the size stands 512 bytes before the block, which stays aligned */
  void *raw;
  if (used + n > hbm() || posix_memalign(&raw, 512, n + 1024)) return out_of_memory();
  *(size_t *)raw = n;
  used += n;
  *p = (char *)raw + 512;
  return OK;
}
static int drop_memory(void *p) {
  if (!p) return OK;
  used -= *(size_t *)((char *)p - 512);
  free((char *)p - 512);
  return OK;
}
int aclrtMalloc(void **p, size_t n, int policy) { return get_memory(p, n); }
int aclrtMallocAlign32(void **p, size_t n, int policy) { return get_memory(p, n); }
int aclrtFree(void *p) { return drop_memory(p); }
int aclrtMallocHost(void **p, size_t n) { return posix_memalign(p, 512, n + 64) ? OUT_OF_MEMORY : OK; }
int aclrtMallocHostWithCfg(void **p, uint64_t n, void *cfg) { return aclrtMallocHost(p, n); }
int aclrtFreeHost(void *p) { free(p); return OK; }
int aclrtGetMemInfo(int attr, size_t *free_bytes, size_t *total) {
  *total = hbm();
  *free_bytes = hbm() - used;
  return OK;
}
int aclrtMemcpy(void *d, size_t max, const void *s, size_t n, int kind) { memmove(d, s, n); return OK; }
int aclrtMemcpyAsync(void *d, size_t max, const void *s, size_t n, int kind, void *st) { memmove(d, s, n); return OK; }
int aclrtMemset(void *d, size_t max, int32_t v, size_t n) { memset(d, v, n); return OK; }
int aclrtMemsetAsync(void *d, size_t max, int32_t v, size_t n, void *st) { memset(d, v, n); return OK; }
/* expandable_segments: the reserved range is lazily filled host memory, so a mapping only has to be counted */
typedef struct { size_t bytes; } Physical;
int aclrtReserveMemAddress(void **p, size_t n, size_t align, void *hint, uint64_t flags) {
  char *raw = mmap(NULL, n + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return OUT_OF_MEMORY;
  *(size_t *)raw = n + 4096;
  *p = raw + 4096;
  return OK;
}
int aclrtReleaseMemAddress(void *p) { char *raw = (char *)p - 4096; munmap(raw, *(size_t *)raw); return OK; }
int aclrtMallocPhysical(void **handle, size_t n, const void *prop, uint64_t flags) {
  if (used + n > hbm()) return out_of_memory();
  Physical *p = malloc(sizeof *p);
  p->bytes = n;
  used += n;
  *handle = p;
  return OK;
}
int aclrtFreePhysical(void *handle) { used -= ((Physical *)handle)->bytes; free(handle); return OK; }
int aclrtMapMem(void *p, size_t n, size_t offset, void *handle, uint64_t flags) { return OK; }
int aclrtUnmapMem(void *p) { return OK; }

/* ---- streams and events ---- */
static _Atomic int32_t streams;
typedef struct { int32_t id; } Stream;
static int new_stream(void **s) { Stream *st = malloc(sizeof *st); st->id = ++streams; *s = st; return OK; }
int aclrtCreateStream(void **s) { return new_stream(s); }
int aclrtCreateStreamWithConfig(void **s, uint32_t priority, uint32_t flag) { return new_stream(s); }
int aclrtStreamGetId(void *s, int32_t *id) { *id = s ? ((Stream *)s)->id : 0; return OK; }
int aclrtDestroyStream(void *s) { free(s); return OK; }
int aclrtDestroyStreamForce(void *s) { free(s); return OK; }
int aclrtStreamQuery(void *s, int *status) { *status = 0; return OK; }
int aclrtGetStreamOverflowSwitch(void *s, uint32_t *f) { *f = 0; return OK; }
typedef struct { double recorded; } Event;
int aclrtCreateEventExWithFlag(void **e, uint32_t flag) { *e = calloc(1, sizeof(Event)); return OK; }
int aclrtCreateEventWithFlag(void **e, uint32_t flag) { return aclrtCreateEventExWithFlag(e, flag); }
int aclrtDestroyEvent(void *e) { free(e); return OK; }
int aclrtRecordEvent(void *e, void *s) { ((Event *)e)->recorded = now(); return OK; }
int aclrtQueryEventStatus(void *e, int *s) { *s = 1; return OK; }
int aclrtQueryEventWaitStatus(void *e, int *s) { *s = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *a, void *b) {
  *ms = 1e3 * (((Event *)b)->recorded - ((Event *)a)->recorded);
  return OK;
}
int aclrtSynchronizeDevice(void) { count("sync.device", 0); return OK; }
int aclrtSynchronizeDeviceWithTimeout(int32_t t) { count("sync.device", 0); return OK; }
int aclrtSynchronizeStream(void *s) { count("sync.stream", 0); return OK; }
int aclrtSynchronizeStreamWithTimeout(void *s, int32_t t) { count("sync.stream", 0); return OK; }
int aclrtSynchronizeEvent(void *e) { count("sync.event", 0); return OK; }

/* ---- answers that change nothing: each name here was looked at, and doing nothing is right for host memory ---- */
#define HARMLESS(name) int name(void) { return OK; }
HARMLESS(aclInit) HARMLESS(aclFinalize) HARMLESS(aclAppLog) HARMLESS(aclrtResetDevice)
HARMLESS(aclrtSetCurrentContext) HARMLESS(aclrtDeviceEnablePeerAccess) HARMLESS(aclrtStreamWaitEvent)
HARMLESS(aclrtResetEvent) HARMLESS(aclrtSetOpWaitTimeout) HARMLESS(aclrtSetOpExecuteTimeOut)
HARMLESS(aclrtSetDeviceSatMode) HARMLESS(aclrtSetStreamFailureMode) HARMLESS(aclrtSetStreamOverflowSwitch)
HARMLESS(aclrtSetStreamAttribute) HARMLESS(aclrtCtxSetSysParamOpt) HARMLESS(aclrtProcessReport)
HARMLESS(aclrtPeekAtLastError) HARMLESS(aclrtGetLastError) HARMLESS(aclSetCompileopt) HARMLESS(aclmdlInitDump)
HARMLESS(aclmdlSetDump) HARMLESS(aclmdlFinalizeDump) HARMLESS(MsprofGetHashId) HARMLESS(MsprofRegisterCallback)
HARMLESS(MsprofReportAdditionalInfo) HARMLESS(MsprofReportApi) HARMLESS(MsprofReportCompactInfo)
HARMLESS(HcclSetConfig) HARMLESS(aclprofMarkEx) HARMLESS(aclopSetAttrBool) HARMLESS(aclopSetAttrDataType)
HARMLESS(aclopSetAttrFloat) HARMLESS(aclopSetAttrInt) HARMLESS(aclopSetAttrListBool) HARMLESS(aclopSetAttrListFloat)
HARMLESS(aclopSetAttrListInt) HARMLESS(aclopSetAttrListListInt) HARMLESS(aclopSetAttrString)
HARMLESS(aclSetTensorDescName) HARMLESS(aclSetTensorFormat) HARMLESS(aclSetTensorPlaceMent)
HARMLESS(aclSetTensorShape)
static int64_t system_parameters[16];
int aclrtSetSysParamOpt(int option, int64_t value) { system_parameters[option & 15] = value; return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = system_parameters[option & 15]; return OK; }
uint64_t MsprofSysCycleTime(void) { return 0; }
const char *aclrtGetErrorVerbose(void) { return ""; }
int aclsysGetVersionStr(char *name, char *version) { strcpy(version, CANN_VERSION); return OK; }
size_t aclGetCompileoptSize(int option) { return 16; }
int aclGetCompileopt(int option, char *value, size_t n) { strncpy(value, "disable", n); return OK; }

/* ---- operators that torch_npu launches past the dispatcher ----
 * The old way describes tensors, then names the operator: descriptions are accepted, the operator is refused. */
static char description;
void *aclCreateTensorDesc(int dtype, int n, const int64_t *dims, int format) { return &description; }
void *aclCreateDataBuffer(void *data, size_t n) { return &description; }
void *aclopCreateAttr(void) { return &description; }
HARMLESS(aclDestroyTensorDesc) HARMLESS(aclDestroyDataBuffer) HARMLESS(aclopDestroyAttr)
int aclopCompileAndExecute(const char *op) { return npu_sim_unimplemented(op); }
int aclopCompileAndExecuteV2(const char *op) { return npu_sim_unimplemented(op); }

/* The new way calls aclnnXGetWorkspaceSize(tensors..., &executor), then aclnnX(executor). ProcessGroupHCCL pads what it
 * gathers to 512 bytes with these two; every other aclnn name is absent from libopapi, and torch_npu says so. */
typedef struct { char *data; int64_t numel, columns; int dtype, contiguous; } Tensor;
typedef struct { Tensor in, out; int64_t left; } Executor;
enum { ACL_FLOAT, ACL_FLOAT16, ACL_INT8, ACL_INT32, ACL_UINT8, ACL_INT16 = 6, ACL_INT64 = 9, ACL_DOUBLE = 11, ACL_BOOL,
       ACL_BF16 = 27 };
static size_t acl_size(int dtype) {
  switch (dtype) {
    case ACL_INT8: case ACL_UINT8: case ACL_BOOL: return 1;
    case ACL_FLOAT16: case ACL_BF16: case ACL_INT16: return 2;
    case ACL_INT64: case ACL_DOUBLE: return 8;
    default: return 4;
  }
}
void *aclCreateTensor(const int64_t *dims, uint64_t n, int dtype, const int64_t *stride, int64_t offset, int format,
                      const int64_t *storage_dims, uint64_t storage_n, void *data) {
  Tensor *t = malloc(sizeof *t);
  *t = (Tensor){(char *)data + offset * acl_size(dtype), 1, n ? dims[n - 1] : 1, dtype, 1};
  for (int64_t i = (int64_t)n - 1; i >= 0; t->numel *= dims[i], i--)
    if (dims[i] != 1 && stride[i] != t->numel) t->contiguous = 0;
  return t;
}
typedef struct { uint64_t n; int64_t value[]; } IntArray;
void *aclCreateIntArray(const int64_t *v, uint64_t n) {
  IntArray *a = malloc(sizeof *a + n * sizeof *v);
  a->n = n;
  memcpy(a->value, v, n * sizeof *v);
  return a;
}
void *aclCreateScalar(void *v, int dtype) { return calloc(1, 8); } /* the only one that arrives is the padding's 0 */
int aclDestroyTensor(void *p) { free(p); return OK; }
int aclDestroyIntArray(void *p) { free(p); return OK; }
int aclDestroyScalar(void *p) { free(p); return OK; }
static int prepare(const Tensor *in, const Tensor *out, int64_t left, uint64_t *workspace, Executor **e) {
  *workspace = 0;
  *e = malloc(sizeof **e);
  **e = (Executor){*in, *out, left};
  return OK;
}
int aclnnConstantPadNdGetWorkspaceSize(const Tensor *in, const IntArray *pad, const void *value, Tensor *out,
                                       uint64_t *workspace, Executor **e) {
  if (pad->n != 2 || !in->contiguous || !out->contiguous) return npu_sim_unimplemented("aclnnConstantPadNd (general)");
  return prepare(in, out, pad->value[0], workspace, e);
}
int aclnnConstantPadNd(void *w, uint64_t n, Executor *e, void *stream) {
  count("kernel.ConstantPadNd", 0);
  size_t size = acl_size(e->in.dtype), width = e->in.columns * size;
  memset(e->out.data, 0, e->out.numel * size);
  for (int64_t row = 0; width && row < e->in.numel / e->in.columns; row++)
    memcpy(e->out.data + (row * e->out.columns + e->left) * size, e->in.data + row * width, width);
  free(e);
  return OK;
}
int aclnnCastGetWorkspaceSize(const Tensor *in, int dtype, Tensor *out, uint64_t *workspace, Executor **e) {
  int bools = (in->dtype == ACL_BOOL && dtype == ACL_INT32) || (in->dtype == ACL_INT32 && dtype == ACL_BOOL);
  if (!bools || !in->contiguous || !out->contiguous) return npu_sim_unimplemented("aclnnCast (general)");
  return prepare(in, out, 0, workspace, e);
}
int aclnnCast(void *w, uint64_t n, Executor *e, void *stream) {
  count("kernel.Cast", 0);
  for (int64_t i = 0; i < e->in.numel; i++) {
    if (e->in.dtype == ACL_BOOL) ((int32_t *)e->out.data)[i] = e->in.data[i] != 0;
    else e->out.data[i] = ((int32_t *)e->in.data)[i] != 0;
  }
  free(e);
  return OK;
}

/* ---- HCCL over shared memory ---- */
enum { HCCL_PARA = 1, HCCL_MEMORY = 3, HCCL_NOT_SUPPORT = 5, HCCL_TIMEOUT = 9, FP64 = 10 };
#define CHUNK (1 << 20)   /* a rank's slot: collectives go through it piece by piece */
#define LETTER (1 << 16)  /* a mailbox: point-to-point messages go through it piece by piece */
#define MAX_RANKS 64
typedef struct { char name[24]; uint64_t n; int32_t dtype, op, root; } Header;
typedef struct { _Atomic uint32_t full; uint32_t bytes; char data[LETTER]; } Mailbox;
typedef struct {
  _Atomic uint32_t arrived, generation;
  _Atomic uint64_t visits[MAX_RANKS];
  Header header[MAX_RANKS];
} Control;
typedef struct {
  uint32_t n, rank;
  int error;
  double timeout;
  char name[96];
  Control *control;
  char *slots, *result;
  Mailbox *mail;
  size_t bytes;
} Comm;

static size_t hccl_size(int dtype) {
  static const int sizes[] = {1, 2, 4, 2, 4, 8, 8, 1, 2, 4, 8, 2};
  return dtype < 12 ? sizes[dtype] : 1;
}
static char *slot(Comm *c, uint32_t rank) { return c->slots + (size_t)rank * CHUNK; }
static double seconds(const char *variable, double otherwise) {
  const char *v = getenv(variable);
  double s = v && *v ? atof(v) : otherwise;
  return s > 0 ? s : 1e9;
}
static int time_out(Comm *c, const char *code, const char *doing, double waited) {
  char missing[256] = "";
  for (uint32_t r = 0; r < c->n; r++)
    if (c->control->visits[r] < c->control->visits[c->rank]) sprintf(missing + strlen(missing) % 240, " %u", r);
  fail(0, "%s: simulated HCCL: rank %u of %u waited %.0f s in %s; not there: rank%s", code, c->rank, c->n, waited,
       doing, *missing ? missing : " unknown");
  fprintf(stderr, "%s\n", last_error);
  return c->error = HCCL_TIMEOUT;
}
static int wait_all(Comm *c, const char *code, const char *doing) {
  Control *k = c->control;
  double start = now();
  uint32_t generation = atomic_load(&k->generation);
  atomic_fetch_add(&k->visits[c->rank], 1);
  if (atomic_fetch_add(&k->arrived, 1) == c->n - 1) {
    atomic_store(&k->arrived, 0);
    atomic_fetch_add(&k->generation, 1);
    syscall(SYS_futex, &k->generation, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    return OK;
  }
  while (atomic_load(&k->generation) == generation) {
    if (now() - start > c->timeout) return time_out(c, code, doing, c->timeout);
    struct timespec pause = {0, 100000000};
    syscall(SYS_futex, &k->generation, FUTEX_WAIT, generation, &pause, NULL, 0);
  }
  return OK;
}
#define MEET(c, doing) do { int e_ = wait_all(c, "EI0002", doing); if (e_) return e_; } while (0)

int HcclGetRootInfo(void *info) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  memset(info, 0, 4108);
  sprintf(info, "/npu_sim-%d-%ld-%09ld", getpid(), (long)t.tv_sec, t.tv_nsec);
  return OK;
}
static int join_group(uint32_t n, const void *info, uint32_t rank, void **out) {
  if (n > MAX_RANKS) return fail(HCCL_PARA, "simulated HCCL: %u ranks, at most %d", n, MAX_RANKS);
  Comm *c = calloc(1, sizeof *c);
  c->n = n;
  c->rank = rank;
  strncpy(c->name, info, sizeof c->name - 1);
  size_t control = (sizeof(Control) + 4095) / 4096 * 4096;
  c->bytes = control + (size_t)(n + 1) * CHUNK + (size_t)n * n * sizeof(Mailbox);
  int fd = shm_open(c->name, O_CREAT | O_RDWR, 0600);
  if (fd < 0 || ftruncate(fd, c->bytes)) return fail(HCCL_MEMORY, "simulated HCCL: shared memory: %s", strerror(errno));
  char *base = mmap(0, c->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (base == MAP_FAILED) return fail(HCCL_MEMORY, "simulated HCCL: shared memory: %s", strerror(errno));
  c->control = (Control *)base;
  c->slots = base + control;
  c->result = c->slots + (size_t)n * CHUNK;
  c->mail = (Mailbox *)(c->result + CHUNK);
  c->timeout = seconds("HCCL_CONNECT_TIMEOUT", 120);
  int error = wait_all(c, "EI0006", "joining the communicator");
  if (rank == 0 || error) shm_unlink(c->name);
  c->timeout = seconds("HCCL_EXEC_TIMEOUT", 1836);
  *out = c;
  return error;
}
int HcclCommInitRootInfo(uint32_t n, const void *i, uint32_t r, void **out) { return join_group(n, i, r, out); }
int HcclCommInitRootInfoConfig(uint32_t n, const void *i, uint32_t r, const void *config, void **out) {
  return join_group(n, i, r, out);
}
int HcclCommDestroy(void *comm) { munmap(((Comm *)comm)->control, ((Comm *)comm)->bytes); free(comm); return OK; }
int HcclGetCommAsyncError(void *c, int *e) { *e = ((Comm *)c)->error; return OK; }
int HcclGetCommName(void *c, char *name) { strcpy(name, ((Comm *)c)->name); return OK; }
const char *HcclGetErrorString(int code) { return code == HCCL_TIMEOUT ? "EI0002: time-out" : last_error; }

/* Say what is called; float64 is refused as HCCL does before Ascend950, where it would be reduced. */
static int begin(Comm *c, const char *name, uint64_t n, int dtype, int op, int root, int reduces) {
  static const char prefix[] = "hccl.";
  if (c->error) return c->error;
  if (reduces && dtype == FP64 && !strstr(aclrtGetSocName(), "950")) {
    count("refused.float64", n * 8);
    return fail(HCCL_NOT_SUPPORT, "simulated HCCL: %s does not take float64", name + sizeof prefix - 1);
  }
  count(name, n * hccl_size(dtype));
  Header *h = &c->control->header[c->rank];
  memset(h, 0, sizeof *h);
  strncpy(h->name, name + sizeof prefix - 1, sizeof h->name - 1);
  h->n = n; h->dtype = dtype; h->op = op; h->root = root;
  MEET(c, h->name);
  for (uint32_t r = 0; r < c->n; r++) {
    Header *other = &c->control->header[r];
    if (!memcmp(h, other, sizeof *h)) continue;
    const char *format = "EI0005: simulated HCCL: rank %u calls %s of %lu (type %d), rank %u %s of %lu (type %d)";
    return c->error = fail(HCCL_PARA, format, c->rank, h->name, h->n, h->dtype, r, other->name, other->n, other->dtype);
  }
  return OK;
}
#define BEGIN(...) do { int e_ = begin(__VA_ARGS__); if (e_) return e_; } while (0)

static float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
static uint16_t to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return f != f ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
#define PICK(p, q) \
  (op == 0 ? (p) + (q) : op == 1 ? (p) * (q) : op == 2 ? ((p) > (q) ? (p) : (q)) : ((p) < (q) ? (p) : (q)))
#define REDUCE(T) { T *x = a; const T *y = b; for (size_t i = 0; i < n; i++) x[i] = PICK(x[i], y[i]); } break
static void reduce(void *a, const void *b, size_t n, int dtype, int op) {
  switch (dtype) {
    case 0: REDUCE(int8_t);
    case 1: REDUCE(int16_t);
    case 2: REDUCE(int32_t);
    case 3: REDUCE(_Float16);
    case 4: REDUCE(float);
    case 5: REDUCE(int64_t);
    case 6: REDUCE(uint64_t);
    case 7: REDUCE(uint8_t);
    case FP64: REDUCE(double);
    case 11: {
      uint16_t *x = a;
      const uint16_t *y = b;
      for (size_t i = 0; i < n; i++) x[i] = to_bf16(PICK(from_bf16(x[i]), from_bf16(y[i])));
    }
  }
}
/* for every piece of `total` elements of size e: n elements from element o on */
#define PIECES(total) \
  for (uint64_t o = 0, per = CHUNK / e, n; o < (total) && (n = (total) - o < per ? (total) - o : per, 1); o += per)

/* Each rank reduces its share of every piece, in rank order, so all read the same bits. Only `wanted` writes out. */
static int all_reduce(char *in, char *out, uint64_t total, int dtype, int op, Comm *c, int wanted, const char *doing) {
  size_t e = hccl_size(dtype);
  PIECES(total) {
    memcpy(slot(c, c->rank), in + o * e, n * e);
    MEET(c, doing);
    uint64_t from = n * c->rank / c->n, share = n * (c->rank + 1) / c->n - from;
    memcpy(c->result + from * e, slot(c, 0) + from * e, share * e);
    for (uint32_t r = 1; r < c->n; r++) reduce(c->result + from * e, slot(c, r) + from * e, share, dtype, op);
    MEET(c, doing);
    if (wanted) memcpy(out + o * e, c->result, n * e);
  }
  MEET(c, doing);
  return OK;
}
int HcclAllReduce(void *in, void *out, uint64_t n, int dtype, int op, void *c, void *stream) {
  BEGIN(c, "hccl.AllReduce", n, dtype, op, 0, 1);
  return all_reduce(in, out, n, dtype, op, c, 1, "AllReduce");
}
int HcclReduce(void *in, void *out, uint64_t n, int dtype, int op, uint32_t root, void *comm, void *stream) {
  BEGIN(comm, "hccl.Reduce", n, dtype, op, root, 1);
  return all_reduce(in, out, n, dtype, op, comm, ((Comm *)comm)->rank == root, "Reduce");
}
int HcclReduceScatter(void *in, void *out, uint64_t n, int dtype, int op, void *comm, void *stream) {
  Comm *c = comm;
  size_t bytes = n * hccl_size(dtype);
  BEGIN(c, "hccl.ReduceScatter", n * c->n, dtype, op, 0, 1);
  char *all = malloc(bytes * c->n);
  int error = all_reduce(in, all, n * c->n, dtype, op, c, 1, "ReduceScatter");
  if (!error) memcpy(out, all + bytes * c->rank, bytes);
  free(all);
  return error;
}
int HcclBroadcast(void *buffer, uint64_t total, int dtype, uint32_t root, void *comm, void *stream) {
  Comm *c = comm;
  size_t e = hccl_size(dtype);
  BEGIN(c, "hccl.Broadcast", total, dtype, 0, root, 0);
  PIECES(total) {
    if (c->rank == root) memcpy(slot(c, root), (char *)buffer + o * e, n * e);
    MEET(c, "Broadcast");
    if (c->rank != root) memcpy((char *)buffer + o * e, slot(c, root), n * e);
    MEET(c, "Broadcast");
  }
  return OK;
}
int HcclAllGather(void *in, void *out, uint64_t total, int dtype, void *comm, void *stream) {
  Comm *c = comm;
  size_t e = hccl_size(dtype);
  BEGIN(c, "hccl.AllGather", total, dtype, 0, 0, 0);
  PIECES(total) {
    memcpy(slot(c, c->rank), (char *)in + o * e, n * e);
    MEET(c, "AllGather");
    for (uint32_t r = 0; r < c->n; r++) memcpy((char *)out + (r * total + o) * e, slot(c, r), n * e);
    MEET(c, "AllGather");
  }
  return OK;
}
int HcclBarrier(void *comm, void *stream) {
  BEGIN(comm, "hccl.Barrier", 0, 0, 0, 0, 0);
  MEET((Comm *)comm, "Barrier");
  return OK;
}

/* Point to point: letters through one mailbox a pair. The transfers of a call advance together, so no order can lock. */
typedef struct { int32_t receives; void *data; uint64_t n; int32_t dtype; uint32_t peer; } Item; /* HcclSendRecvItem */
static int exchange(Item *items, uint32_t count_items, Comm *c, const char *doing) {
  if (c->error) return c->error;
  uint64_t done[2 * MAX_RANKS] = {0};
  if (count_items > 2 * MAX_RANKS) return fail(HCCL_PARA, "simulated HCCL: %u transfers in a call", count_items);
  double start = now();
  for (uint32_t left = count_items; left;) {
    int moved = 0;
    left = 0;
    for (uint32_t i = 0; i < count_items; i++) {
      Item *t = &items[i];
      uint64_t bytes = t->n * hccl_size(t->dtype), piece = bytes - done[i] < LETTER ? bytes - done[i] : LETTER;
      if (!piece) continue;
      left++;
      int blocked = 0; /* behind an earlier transfer of the same call with the same peer */
      for (Item *u = items; u < t; u++)
        blocked |= u->peer == t->peer && u->receives == t->receives && done[u - items] < u->n * hccl_size(u->dtype);
      Mailbox *m = t->receives ? &c->mail[t->peer * c->n + c->rank] : &c->mail[c->rank * c->n + t->peer];
      if (blocked || atomic_load(&m->full) != (uint32_t)t->receives) continue;
      if (t->receives) {
        if (m->bytes != piece)
          return c->error = fail(HCCL_PARA, "EI0005: simulated HCCL: rank %u expects %lu bytes from rank %u, %u come",
                                 c->rank, piece, t->peer, m->bytes);
        memcpy((char *)t->data + done[i], m->data, piece);
      } else {
        memcpy(m->data, (char *)t->data + done[i], piece);
        m->bytes = piece;
      }
      atomic_store(&m->full, !t->receives);
      done[i] += piece;
      moved = 1;
    }
    if (left && !moved) {
      if (now() - start > c->timeout) return time_out(c, "EI0002", doing, c->timeout);
      struct timespec pause = {0, 50000};
      nanosleep(&pause, NULL);
    }
  }
  return OK;
}
/* Between HcclGroupStart and HcclGroupEnd transfers are gathered, to advance together; collectives run at once. */
static _Thread_local struct { int depth; uint32_t n; Comm *comm; Item items[2 * MAX_RANKS]; } group;
int HcclGroupStart(void) { group.depth++; return OK; }
int HcclGroupEnd(void) {
  if (--group.depth || !group.n) return OK;
  uint32_t n = group.n;
  group.n = 0;
  return exchange(group.items, n, group.comm, "a group of transfers");
}
static int transfer(Item item, Comm *c, const char *doing) {
  if (!group.depth) return exchange(&item, 1, c, doing);
  if (group.n == 2 * MAX_RANKS || (group.n && group.comm != c))
    return fail(HCCL_PARA, "simulated HCCL: a group takes %d transfers of one communicator", 2 * MAX_RANKS);
  group.comm = c;
  group.items[group.n++] = item;
  return OK;
}
int HcclSend(void *data, uint64_t n, int dtype, uint32_t peer, void *c, void *stream) {
  count("hccl.Send", n * hccl_size(dtype));
  return transfer((Item){0, data, n, dtype, peer}, c, "Send");
}
int HcclRecv(void *data, uint64_t n, int dtype, uint32_t peer, void *c, void *stream) {
  count("hccl.Recv", n * hccl_size(dtype));
  return transfer((Item){1, data, n, dtype, peer}, c, "Recv");
}
int HcclBatchSendRecv(Item *items, uint32_t n, void *c, void *stream) {
  for (uint32_t i = 0; i < n; i++) count("hccl.BatchSendRecv", items[i].n * hccl_size(items[i].dtype));
  return exchange(items, n, c, "BatchSendRecv");
}
int HcclAlltoAllV(char *in, const uint64_t *sends, const uint64_t *from, int dtype, char *out, const uint64_t *receives,
                  const uint64_t *to, int out_dtype, void *comm, void *stream) {
  Comm *c = comm;
  Item items[2 * MAX_RANKS];
  size_t e = hccl_size(dtype), k = 0, total = 0;
  for (uint32_t r = 0; r < c->n; total += sends[r++] * e) {
    items[k++] = (Item){0, in + from[r] * e, sends[r], dtype, r};
    items[k++] = (Item){1, out + to[r] * e, receives[r], dtype, r};
  }
  count("hccl.AlltoAllV", total);
  return exchange(items, k, c, "AlltoAllV");
}
int HcclAlltoAll(char *in, uint64_t n, int dtype, char *out, uint64_t out_n, int out_dtype, void *comm, void *stream) {
  Comm *c = comm;
  Item items[2 * MAX_RANKS];
  size_t e = hccl_size(dtype), k = 0;
  for (uint32_t r = 0; r < c->n; r++) {
    items[k++] = (Item){0, in + r * n * e, n, dtype, r};
    items[k++] = (Item){1, out + r * n * e, n, dtype, r};
  }
  count("hccl.AlltoAll", c->n * n * e);
  return exchange(items, k, c, "AlltoAll");
}
int HcclScatter(char *in, void *out, uint64_t n, int dtype, uint32_t root, void *comm, void *stream) {
  Comm *c = comm;
  Item items[MAX_RANKS + 1];
  size_t e = hccl_size(dtype), k = 0;
  for (uint32_t r = 0; c->rank == root && r < c->n; r++) items[k++] = (Item){0, in + r * n * e, n, dtype, r};
  items[k++] = (Item){1, out, n, dtype, root};
  count("hccl.Scatter", n * e);
  return exchange(items, k, c, "Scatter");
}
