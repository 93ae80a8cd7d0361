/* A moving average of three inputs, the first of which counts as preceded by zeros. */
#include <causal_conv1d.h>
#include <stdio.h>

int main(void) {
  float x[6] = {3, 6, 9, 9, 6, 3}, out[6];
  float weight[3] = {1.0f / 3, 1.0f / 3, 1.0f / 3};
  causal_conv1d_forward_params params = {0};
  causal_conv1d_status status;
  int t;

  /* data, sizes, strides, number of dimensions, type */
  params.x = (causal_conv1d_tensor){x, {1, 1, 6}, {6, 6, 1}, 3, CAUSAL_CONV1D_FLOAT32};
  params.weight = (causal_conv1d_tensor){weight, {1, 3}, {3, 1}, 2, CAUSAL_CONV1D_FLOAT32};
  params.out = (causal_conv1d_tensor){out, {1, 1, 6}, {6, 6, 1}, 3, CAUSAL_CONV1D_FLOAT32};
  status = causal_conv1d_cpu_forward(&params, 1);
  if (status.code != CAUSAL_CONV1D_OK) {
    fprintf(stderr, "%s\n", status.message);
    return 1;
  }
  printf("causal_conv1d %d.%d, %s:", CAUSAL_CONV1D_VERSION_MAJOR, CAUSAL_CONV1D_VERSION_MINOR,
         causal_conv1d_cpu_isa());
  for (t = 0; t < 6; ++t) printf(" %g", out[t]);
  printf("\n");
  return 0;
}
