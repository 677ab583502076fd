// Runs the model of this folder with TVM's runtime:
//
//   runner in.npz out.npz [--model FILE] [--threads N]     outputs for one set of inputs
//   runner in.npz --bench SECONDS [...]                    one line of JSON: times of one run
//
// Keys of in.npz are names of inputs; out.npz gets an array for each output. Needs libtvm_runtime and libtvm_ffi, nothing else.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <new>
#include <string>
#include <vector>

#include "npz.h"
#include "settings.h"  // MODEL, THREADS, INPUTS, OUTPUTS: written when the bundle was made

namespace ffi = tvm::ffi;

namespace {

constexpr std::align_val_t ALIGNMENT{64};  // kernels load whole vectors and take for granted that arrays begin where one can
constexpr int POOLED = 2;                  // the allocator that keeps memory for the next run

struct Arguments {
  std::string input, output, model = MODEL;
  int threads = THREADS;
  double bench = 0;
};

struct Usage : std::runtime_error {
  using std::runtime_error::runtime_error;
};

Arguments parse(int argc, char** argv) {
  Arguments given;
  std::vector<std::string> files;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      files.push_back(word);
      continue;
    }
    if (i + 1 == argc) throw Usage(word + " wants a value");
    const std::string value = argv[++i];
    if (word == "--model") {
      given.model = value;
    } else if (word == "--threads") {
      given.threads = std::atoi(value.c_str());
    } else if (word == "--bench") {
      given.bench = std::atof(value.c_str());
    } else {
      throw Usage("unknown option " + word);
    }
  }
  if (files.size() != (given.bench > 0 ? 1u : 2u) || given.threads < 1) {
    throw Usage("usage: runner in.npz out.npz [--model FILE] [--threads N] | runner in.npz --bench SECONDS");
  }
  given.input = files[0];
  if (files.size() == 2) given.output = files[1];
  return given;
}

const std::map<char, uint8_t>& kinds() {
  static const std::map<char, uint8_t> known = {{'f', kDLFloat}, {'i', kDLInt}, {'u', kDLUInt}, {'b', kDLBool}};
  return known;
}

// NumPy's letter and bytes; what .npz files do not hold becomes a text that is no such type.
std::string type_name(DLDataType type) {
  for (const auto& [letter, code] : kinds()) {
    if (type.code == code && type.lanes == 1 && type.bits % 8 == 0) return letter + std::to_string(type.bits / 8);
  }
  return "another type";
}

struct Allocator {
  void AllocData(DLTensor* tensor) { tensor->data = ::operator new(ffi::GetDataSize(*tensor), ALIGNMENT); }
  void FreeData(DLTensor* tensor) { ::operator delete(tensor->data, ALIGNMENT); }
};

ffi::Tensor as_tensor(const npz::Array& array) {
  const auto bits = static_cast<uint8_t>(8 * npz::detail::width_of(array.type));
  const DLDataType type{kinds().at(array.type[0]), bits, 1};
  const ffi::ShapeView shape(array.shape.data(), array.shape.size());
  ffi::Tensor tensor = ffi::Tensor::FromNDAlloc(Allocator(), shape, type, DLDevice{kDLCPU, 0});
  std::copy(array.data.begin(), array.data.end(), static_cast<char*>(tensor.data_ptr()));
  return tensor;
}

npz::Array as_array(const ffi::Tensor& tensor, const std::string& name) {
  npz::Array array;
  array.type = type_name(tensor.dtype());
  array.shape.assign(tensor.shape().begin(), tensor.shape().end());
  const size_t width = npz::detail::width_of(array.type);
  if (!width) throw std::runtime_error("output '" + name + "' has a type that .npz files do not hold");
  if (!tensor.IsContiguous()) throw std::runtime_error("output '" + name + "' is not row after row");
  const char* data = static_cast<const char*>(tensor.data_ptr()) + tensor.byte_offset();
  array.data.assign(data, data + array.count() * width);
  return array;
}

std::vector<ffi::AnyView> views(const std::vector<ffi::Tensor>& tensors) { return {tensors.begin(), tensors.end()}; }

std::vector<ffi::Tensor> feed(const npz::Arrays& arrays) {
  std::vector<ffi::Tensor> tensors;
  for (const Value& value : INPUTS) {
    const auto found = arrays.find(value.name);
    if (found == arrays.end()) throw std::runtime_error("no array '" + value.name + "', which is an input of the model");
    const npz::Array& array = found->second;
    if (array.type != value.type) {
      throw std::runtime_error("input '" + value.name + "' has type " + array.type + ", the model wants " + value.type);
    }
    bool fits = value.shape.size() == array.shape.size();
    for (size_t axis = 0; fits && axis < array.shape.size(); ++axis) {
      fits = value.shape[axis] < 0 || value.shape[axis] == array.shape[axis];
    }
    if (!fits) throw std::runtime_error("input '" + value.name + "' has another shape than the model's");
    tensors.push_back(as_tensor(array));
  }
  return tensors;
}

// A model of several outputs returns them as an array, which may hold arrays.
void flatten(const ffi::Any& result, std::vector<ffi::Tensor>& into) {
  if (const auto tensor = result.as<ffi::Tensor>()) {
    into.push_back(*tensor);
    return;
  }
  for (const ffi::Any& each : result.cast<ffi::Array<ffi::Any>>()) flatten(each, into);
}

ffi::Function function_of(const ffi::Module& module, const char* name) {
  const ffi::Optional<ffi::Function> found = module->GetFunction(name);
  if (!found.has_value()) throw std::runtime_error(std::string("the model has no function '") + name + "'");
  return found.value();
}

ffi::Module loaded(const std::string& path) {
  try {
    return ffi::Module::LoadFromFile(std::filesystem::absolute(path).string());  // a name alone is sought in the system
  } catch (const ffi::Error& error) {
    throw std::runtime_error(path + ": " + error.message());
  }
}

// The virtual machine of the model; it must outlive what its functions return.
ffi::Module load(const std::string& path, int threads) {
  if (!std::filesystem::is_regular_file(path)) throw std::runtime_error(path + ": no such file");
  const ffi::Module library = loaded(path);
  const auto machine = function_of(library, "vm_load_executable")().cast<ffi::Module>();
  function_of(machine, "vm_initialization")(static_cast<int>(kDLCPU), 0, POOLED);
  // The list is only counted; without it the runtime asks the system for the number at each parallel loop.
  ffi::Array<ffi::String> numbers;
  for (int i = 0; i < threads; ++i) numbers.push_back(std::to_string(i));
  ffi::Function::GetGlobalRequired("runtime.config_threadpool")(0, threads, numbers);
  return machine;
}

void print_times(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  const auto at = [&times](double share) { return times[static_cast<size_t>(share * static_cast<double>(times.size() - 1))]; };
  std::cout << "{\"median_ms\": " << at(0.5) << ", \"low_ms\": " << at(0.25) << ", \"high_ms\": " << at(0.75)
            << ", \"runs\": " << times.size() << "}" << std::endl;
}

void run(const Arguments& given) {
  npz::Arrays arrays;
  try {
    arrays = npz::read(given.input);
  } catch (const npz::Error& error) {
    throw std::runtime_error(given.input + ": " + error.what());
  }
  const std::vector<ffi::Tensor> inputs = feed(arrays);
  const ffi::Module machine = load(given.model, given.threads);
  const ffi::Function main = function_of(machine, "main");
  const std::vector<ffi::AnyView> words = views(inputs);
  const auto once = [&] {
    ffi::Any result;
    main.CallPacked(words.data(), static_cast<int32_t>(words.size()), &result);
    return result;
  };
  std::vector<ffi::Tensor> results;
  flatten(once(), results);
  if (given.bench > 0) {
    using Clock = std::chrono::steady_clock;
    for (int i = 0; i < 4; ++i) once();
    std::vector<double> times;
    for (const auto start = Clock::now(); times.size() < 10 || std::chrono::duration<double>(Clock::now() - start).count() < given.bench;) {
      const auto begin = Clock::now();
      once();
      times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
    }
    print_times(times);
    return;
  }
  if (results.size() != OUTPUTS.size()) {
    throw std::runtime_error(given.model + " has " + std::to_string(results.size()) + " outputs: settings.h is another model's");
  }
  npz::Arrays found;
  for (size_t i = 0; i < results.size(); ++i) found[OUTPUTS[i]] = as_array(results[i], OUTPUTS[i]);
  try {
    npz::write(given.output, found);
  } catch (const npz::Error& error) {
    throw std::runtime_error(given.output + ": " + error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  setenv("TVM_BIND_THREADS", "0", 0);  // the system places threads better than the runtime does beside other programs
  try {
    run(parse(argc, argv));
  } catch (const Usage& error) {
    std::cerr << error.what() << std::endl;
    return 2;
  } catch (const ffi::Error& error) {
    std::cerr << error.message() << std::endl;  // what() would add where in TVM
    return 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return 0;
}
