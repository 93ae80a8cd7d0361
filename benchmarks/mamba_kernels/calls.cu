// extern "C" over mamba_ssm's kernels: contiguous tensors, B and C (batch, groups, dstate, seqlen).
#include <cuda_runtime.h>
#include <cstdint>
#include <cstring>
#include "selective_scan.h"
cudaError_t mamba_error = cudaSuccess;
void fwd_bf16(SSMParamsBase&, cudaStream_t);
void fwd_fp32(SSMParamsBase&, cudaStream_t);
void bwd_bf16(SSMParamsBwd&, cudaStream_t);
void bwd_fp32(SSMParamsBwd&, cudaStream_t);

struct MambaCall {
  int64_t batch, dim, seqlen, dstate, groups, bf16;
  void *u, *delta, *A, *B, *C, *D, *z, *delta_bias;  // z may be null
  void *out, *out_z, *x;                             // forward writes, backward reads out and x
  void *dout, *du, *ddelta, *dA, *dB, *dC, *dD, *dz,
      *ddelta_bias;  // dA to dD, ddelta_bias: fp32, zeroed by the caller
};

// set_ssm_params_fwd of selective_scan.cpp for contiguous tensors.
static void set_fwd(SSMParamsBase& p, const MambaCall& c, void* out, void* out_z) {
  p.batch = c.batch;
  p.dim = c.dim;
  p.seqlen = c.seqlen;
  p.dstate = c.dstate;
  p.n_groups = c.groups;
  p.n_chunks = (c.seqlen + 2048 - 1) / 2048;
  p.dim_ngroups_ratio = c.dim / c.groups;
  p.delta_softplus = p.is_variable_B = p.is_variable_C = true;
  p.u_ptr = c.u;
  p.delta_ptr = c.delta;
  p.A_ptr = c.A;
  p.B_ptr = c.B;
  p.C_ptr = c.C;
  p.D_ptr = c.D;
  p.delta_bias_ptr = c.delta_bias;
  p.out_ptr = out;
  p.x_ptr = c.x;
  p.z_ptr = c.z;
  p.out_z_ptr = out_z;
  p.A_d_stride = c.dstate;
  p.A_dstate_stride = 1;
  p.B_batch_stride = p.C_batch_stride = c.groups * c.dstate * c.seqlen;
  p.B_group_stride = p.C_group_stride = c.dstate * c.seqlen;
  p.B_dstate_stride = p.C_dstate_stride = c.seqlen;
  p.u_batch_stride = p.delta_batch_stride = p.out_batch_stride = c.dim * c.seqlen;
  p.u_d_stride = p.delta_d_stride = p.out_d_stride = c.seqlen;
  if (c.z) {
    p.z_batch_stride = p.out_z_batch_stride = c.dim * c.seqlen;
    p.z_d_stride = p.out_z_d_stride = c.seqlen;
  }
}

static bool supported(const MambaCall& c) {
  return c.seqlen > 1024 && c.dstate <= 256 && c.dim % c.groups == 0;
}

extern "C" __attribute__((visibility("default"))) int64_t mamba_call_size() {
  return sizeof(MambaCall);
}

extern "C" __attribute__((visibility("default"))) int mamba_fwd(const MambaCall* c,
                                                                cudaStream_t stream) {
  if (!supported(*c)) return cudaErrorInvalidValue;
  mamba_error = cudaSuccess;
  SSMParamsBase p;
  memset(&p, 0, sizeof p);
  set_fwd(p, *c, c->out, c->z ? c->out_z : nullptr);
  c->bf16 ? fwd_bf16(p, stream) : fwd_fp32(p, stream);
  return mamba_error;
}

extern "C" __attribute__((visibility("default"))) int mamba_bwd(const MambaCall* c,
                                                                cudaStream_t stream) {
  if (!supported(*c)) return cudaErrorInvalidValue;
  mamba_error = cudaSuccess;
  SSMParamsBwd p;
  memset(&p, 0, sizeof p);
  // As theirs with recompute_out_z off: "dout" stands in for out without z, and out_z is null.
  set_fwd(p, *c, c->z ? c->out : c->dout, nullptr);
  p.dout_ptr = c->dout;
  p.du_ptr = c->du;
  p.dA_ptr = c->dA;
  p.dB_ptr = c->dB;
  p.dC_ptr = c->dC;
  p.dD_ptr = c->dD;
  p.ddelta_ptr = c->ddelta;
  p.ddelta_bias_ptr = c->ddelta_bias;
  p.dz_ptr = c->z ? c->dz : nullptr;
  p.dout_batch_stride = p.du_batch_stride = p.ddelta_batch_stride = c->dim * c->seqlen;
  p.dout_d_stride = p.du_d_stride = p.ddelta_d_stride = c->seqlen;
  p.dA_d_stride = c->dstate;
  p.dA_dstate_stride = 1;
  p.dB_batch_stride = p.dC_batch_stride = c->groups * c->dstate * c->seqlen;
  p.dB_group_stride = p.dC_group_stride = c->dstate * c->seqlen;
  p.dB_dstate_stride = p.dC_dstate_stride = c->seqlen;
  if (c->z) {
    p.dz_batch_stride = c->dim * c->seqlen;
    p.dz_d_stride = c->seqlen;
  }
  c->bf16 ? bwd_bf16(p, stream) : bwd_fp32(p, stream);
  return mamba_error;
}
