/* The smallest use of the C API, compiled as C: a moving sum of two inputs. */
#include <causal_conv1d.h>
#include <stdio.h>
#include <string.h>

static causal_conv1d_tensor tensor(float* data, int ndim, int64_t a, int64_t b, int64_t c) {
  causal_conv1d_tensor t;
  memset(&t, 0, sizeof t);
  t.data = data;
  t.ndim = ndim;
  t.dtype = CAUSAL_CONV1D_FLOAT32;
  t.sizes[0] = a;
  t.sizes[1] = b;
  t.sizes[2] = c;
  t.strides[ndim - 1] = 1;
  if (ndim > 1) t.strides[ndim - 2] = t.sizes[ndim - 1];
  if (ndim > 2) t.strides[0] = b * c;
  return t;
}

/* A null pointer is an error like any other. */
static int refuses_null(void) {
  const int32_t codes[] = {
      causal_conv1d_cpu_forward(NULL, 1).code,
      causal_conv1d_cpu_backward(NULL, 1).code,
      causal_conv1d_cpu_update(NULL, 1).code,
      causal_conv1d_cpu_varlen_states(NULL, 1).code,
  };
  size_t i;
  for (i = 0; i < sizeof codes / sizeof codes[0]; ++i) {
    if (codes[i] != CAUSAL_CONV1D_INVALID_ARGUMENT) return 0;
  }
  return 1;
}

int main(void) {
  float x[4] = {1, 2, 3, 4}, weight[2] = {1, 1}, out[4] = {0, 0, 0, 0};
  const float want[4] = {1, 3, 5, 7};
  causal_conv1d_forward_params params;
  causal_conv1d_status status;
  memset(&params, 0, sizeof params);
  params.x = tensor(x, 3, 1, 1, 4);
  params.weight = tensor(weight, 2, 1, 2, 0);
  params.out = tensor(out, 3, 1, 1, 4);
  status = causal_conv1d_cpu_forward(&params, 1);
  if (status.code != CAUSAL_CONV1D_OK) {
    fprintf(stderr, "%s\n", status.message);
    return 1;
  }
  printf("%s: %g %g %g %g\n", causal_conv1d_cpu_isa(), out[0], out[1], out[2], out[3]);
  return memcmp(out, want, sizeof want) != 0 || !refuses_null();
}
