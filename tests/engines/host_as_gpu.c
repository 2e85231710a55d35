/* The functions of NVIDIA's driver that cachec calls, on host memory: what passes through them can be tested without a GPU.
   There is one GPU with FREE_BYTES; every function but the first few wants the context to be current. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, FREE_BYTES = 1 << 24 };
static char context, stream;
static __thread void *current;
static size_t used;

int cuInit(unsigned flags) { return flags; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return index; }
int cuDevicePrimaryCtxRetain(void **result, int device) { *result = &context; return device; }
int cuCtxSetCurrent(void *chosen) { current = chosen; return 0; }
static int wrong(void *given) { return current != &context || given != &stream ? INVALID_CONTEXT : 0; }
int cuStreamCreate(void **result, unsigned flags) { *result = &stream; return flags == 1 ? wrong(&stream) : 1; }
int cuStreamSynchronize(void *given) { return wrong(given); }
int cuMemAlloc_v2(uint64_t *pointer, size_t size) {
  if (wrong(&stream)) return INVALID_CONTEXT;
  if (used + size > FREE_BYTES) return OUT_OF_MEMORY;
  size_t *block = malloc(size + 64);
  *block = size;
  used += size;
  *pointer = (uint64_t)((char *)block + 64);
  memset((char *)block + 64, 255, size);
  return 0;
}
int cuMemFree_v2(uint64_t pointer) {
  size_t *block = (size_t *)((char *)pointer - 64);
  used -= *block;
  free(block);
  return wrong(&stream);
}
int cuMemGetInfo_v2(size_t *left, size_t *total) { *left = FREE_BYTES - used; *total = FREE_BYTES; return wrong(&stream); }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t size, void *given) { memset((void *)to, value, size); return wrong(given); }
int cuMemcpyHtoDAsync_v2(uint64_t to, void *from, size_t size, void *given) { memcpy((void *)to, from, size); return wrong(given); }
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t size, void *given) { memcpy(to, (void *)from, size); return wrong(given); }
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t size, void *given) { memcpy((void *)to, (void *)from, size); return wrong(given); }
int cuGetErrorString(int code, const char **text) { *text = code == INVALID_CONTEXT ? "invalid device context" : "error"; return 0; }
