# make            build ./train_fp4, ./test_fp4 and ./tokenize for what this machine has
# make run        train a small Llama in NVFP4 on this repository's own sources, at once, with no download
# make test       build and run every check that this machine can run
# make bench      time the kernels
# make CPU=1 ...      build for the CPU even where there is a GPU (or to be sure on any machine)
# make FP32=1 ...     activations and working weights in FP32: for tight numerical tests
# make SANITIZE=1 ... CPU build with AddressSanitizer and UndefinedBehaviorSanitizer
# make ARCHS="90" ... choose the GPU architectures yourself: 80 86 89 90 100f 120f
# make kernels-compile   compile everything for all architectures, run nothing (needs nvcc, no GPU)

NVCC     ?= $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CXX      ?= g++
CUDA     := $(if $(NVCC),$(patsubst %/bin/nvcc,%,$(realpath $(shell command -v $(NVCC)))))
GPU_CC   := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
GPU_NAME := $(shell nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)

# ---------------------------------------------------------------- what to build for
# No nvcc: the CPU. nvcc and a GPU: that GPU. nvcc without a GPU: `make` builds for every architecture, while what must run here
# (run, test, bench) is built for the CPU.
RUNS_HERE := $(filter run test bench,$(MAKECMDGOALS))
ifeq ($(CPU)$(SANITIZE),)
  ifeq ($(NVCC),)
    CPU := 1
    WHY := no nvcc found
  else ifeq ($(GPU_CC),)
    ifneq ($(RUNS_HERE),)
      CPU := 1
      WHY := nvcc found, but no GPU to run on
    endif
  endif
else
  CPU := 1
  WHY := asked for
endif

# Blackwell's FP4 instructions exist only in the family targets 100f (B200, B300) and 120f (RTX 50, RTX PRO, GB10).
ALL_ARCHS := 80 90 100f 120f
ifeq ($(GPU_CC),)
  ARCHS ?= $(ALL_ARCHS)
else ifneq ($(filter 100 103,$(GPU_CC)),)
  ARCHS ?= 100f
else ifneq ($(filter 120 121,$(GPU_CC)),)
  ARCHS ?= 120f
else
  ARCHS ?= $(GPU_CC)
endif

VARIANT := $(if $(CPU),cpu,gpu)$(if $(FP32),-fp32)$(if $(SANITIZE),-sanitize)
BUILD   := build/$(VARIANT)

WARN     := -Wall -Wextra
SANITIZERS := -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
# With g++ 12: 41 s of compiling. With more of -O3 (-fpeel-loops -funswitch-loops, more inlining) 50, and a step takes as long: the hottest loops are
# written in vectors (kernels/simd.cuh). -O2 alone compiles in about as long as this, and a step takes a tenth to a fifth more. clang: -O3.
GCC_OPT  := -O2 -ftree-vectorize -fvect-cost-model=dynamic
OPT      := $(if $(SANITIZE),-O1,$(if $(findstring clang,$(shell $(CXX) --version 2>/dev/null)),-O3,$(GCC_OPT)))
CPUFLAGS  = -std=c++17 $(OPT) -march=native -ffp-contract=off -fno-math-errno $(WARN) -Wno-unknown-pragmas -Wno-psabi -U_FORTIFY_SOURCE -pthread -DCPU_BUILD \
            $(if $(FP32),-DFP32) $(if $(SANITIZE),$(SANITIZERS))
# The tests are compiled with less optimization: they are long, and their own speed hardly matters.
TESTFLAGS = $(subst $(OPT),$(if $(SANITIZE),-O1,-O2),$(CPUFLAGS))
GENCODE   = $(foreach a,$(1),-gencode arch=compute_$(a),code=sm_$(a))
NVFLAGS  := -std=c++17 -O3 --threads 0 -Xcompiler -Wall,-Wextra,-Wno-unknown-pragmas $(if $(FP32),-DFP32)

HEADERS := $(wildcard *.cuh kernels/*.cuh data/*.h dev/*.h)

# -rdynamic: --profile finds the names of the kernels in the program itself.
ifneq ($(CPU),)
  COMPILE = $(CXX) $(CPUFLAGS) -x c++
  LINK    = -rdynamic -ldl
else
  COMPILE = $(NVCC) $(NVFLAGS) $(call GENCODE,$(ARCHS))
  LINK    = -lcublasLt
endif

.PHONY: all run test bench clean say kernels-compile
all: train_fp4 test_fp4 tokenize

say:
	@echo "nvcc: $(if $(NVCC),$(NVCC),none)   GPU: $(if $(GPU_CC),$(GPU_NAME) (sm_$(GPU_CC)),none)   building for: $(if $(CPU),the CPU$(if $(WHY), ($(WHY)))$(if $(SANITIZE), with sanitizers),$(patsubst %,sm_%,$(ARCHS)))$(if $(FP32), in FP32)"

# Each variant is kept in its own directory; ./train_fp4 and ./test_fp4 are links to the one that was asked for last.
train_fp4 test_fp4 tokenize: %: $(BUILD)/% FORCE
	@ln -sf $(BUILD)/$* $@
FORCE:

$(BUILD)/train_fp4: train_fp4.cu $(HEADERS) Makefile | say
	@mkdir -p $(BUILD)
	$(COMPILE) $< -o $@ $(LINK)

# The CUDA headers' own conversions, to compare ours with: a separate file, since it wants CUDA's types and the rest of the CPU build ours.
$(BUILD)/cuda_header_codecs.o: dev/cuda_header_codecs.cpp Makefile | say
	@mkdir -p $(BUILD)
	$(CXX) -std=c++17 -O2 $(WARN) $(if $(CUDA),-isystem $(CUDA)/include) -c $< -o $@

$(BUILD)/test_fp4: test_fp4.cu train_fp4.cu $(HEADERS) $(BUILD)/cuda_header_codecs.o Makefile | say
	@mkdir -p $(BUILD)
	$(if $(CPU),$(CXX) $(TESTFLAGS) -x c++,$(COMPILE)) $< -o $@.o -c
	$(if $(CPU),$(CXX) $(TESTFLAGS),$(NVCC)) $@.o $(BUILD)/cuda_header_codecs.o -o $@ $(LINK)
	@rm -f $@.o

$(BUILD)/tokenize: data/tokenize.cpp $(wildcard data/*.h) Makefile | say
	@mkdir -p $(BUILD)
	$(CXX) -std=c++17 -O2 $(WARN) -pthread $(if $(SANITIZE),$(SANITIZERS)) $< -o $@

run: train_fp4
	./train_fp4 $(ARGS)

# The kernels' tests run in both thread orders on the CPU: a missing barrier shows in one of them.
test: test_fp4 train_fp4 tokenize
	./test_fp4 $(ARGS)

bench: test_fp4
	./test_fp4 --bench $(ARGS)

kernels-compile:
	@test -n "$(NVCC)" || { echo "error: kernels-compile needs nvcc; install the CUDA Toolkit"; exit 1; }
	@mkdir -p build/all
	$(NVCC) $(NVFLAGS) -Xptxas -v $(call GENCODE,$(ALL_ARCHS)) -gencode arch=compute_90,code=compute_90 train_fp4.cu -o build/all/train_fp4 -lcublasLt 2> build/all/ptxas.txt || { cat build/all/ptxas.txt; exit 1; }
	@! grep -E 'warning|error' build/all/ptxas.txt
	@echo "compiled for $(patsubst %,sm_%,$(ALL_ARCHS)); registers and spills in build/all/ptxas.txt"

clean:
	rm -rf build train_fp4 test_fp4 tokenize
