"""Stand-ins for NVIDIA's driver and for TensorRT: device memory is host memory, engines are ONNX graphs run by ONNX Runtime.

They are strict where the real ones are: work happens only when its stream is waited for, copies stay inside their allocations, a
thread needs a context, inputs must lie in the profile, and a network must be strongly typed, standard ONNX and without zero points.
"""

from __future__ import annotations

import ctypes
import enum
import json
import threading
import types

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

OUT_OF_MEMORY, NO_DEVICE, INVALID_VALUE, NO_CONTEXT = 2, 100, 1, 201
TEXTS = {OUT_OF_MEMORY: b"out of memory", NO_DEVICE: b"no CUDA-capable device is detected", INVALID_VALUE: b"invalid argument",
         NO_CONTEXT: b"invalid device context"}  # fmt: skip


class Driver:
    """As much of libcuda as nascompile calls."""

    def __init__(self, capability=(8, 9), devices=1, memory=1 << 30, status=0):
        self.capability, self.devices, self.total, self.status = capability, devices, memory, status
        self.memory, self.streams, self.current = {}, {}, threading.local()

    def cuInit(self, flags):
        return self.status

    def cuDeviceGetCount(self, count):
        count._obj.value = self.devices
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"Stub GPU"
        return 0

    def cuDeviceTotalMem_v2(self, size, device):
        size._obj.value = self.total
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 13010
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = self.capability[{75: 0, 76: 1}[attribute]]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context):
        self.current.context = context.value
        return 0

    def cuMemGetInfo_v2(self, free, total):
        free._obj.value, total._obj.value = self.total - self.used, self.total
        return self._in_context()

    def cuMemAlloc_v2(self, address, size):
        if self.used + size.value > self.total:
            return OUT_OF_MEMORY
        block = ctypes.create_string_buffer(size.value)
        address._obj.value = ctypes.addressof(block)
        self.memory[ctypes.addressof(block)] = block
        return self._in_context()

    def cuMemFree_v2(self, address):
        del self.memory[address.value]
        return self._in_context()

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 1000 + len(self.streams)
        self.streams[stream._obj.value] = []
        return self._in_context()

    def cuMemcpyHtoDAsync_v2(self, target, source, size, stream):
        return self._copy(target.value, source.value, size.value, stream.value, device=target.value)

    def cuMemcpyDtoHAsync_v2(self, target, source, size, stream):
        return self._copy(target.value, source.value, size.value, stream.value, device=source.value)

    def cuStreamSynchronize(self, stream):
        waiting, self.streams[stream.value] = self.streams[stream.value], []
        for work in waiting:
            work()
        return self._in_context()

    def cuGetErrorString(self, status, text):
        text._obj.value = TEXTS[status]
        return 0

    @property
    def used(self):
        return sum(len(block) for block in self.memory.values())

    def enqueue(self, stream, work):
        self.streams[stream].append(work)

    def array(self, address, dtype, shape):
        """Device memory as an array; an address that was not allocated, or too little of it, is an error of the caller."""
        assert int(np.prod(shape)) * np.dtype(dtype).itemsize <= len(self.memory[address])
        return np.frombuffer(self.memory[address], dtype, int(np.prod(shape))).reshape(shape)

    def _copy(self, target, source, size, stream, device):
        if device not in self.memory or size > len(self.memory[device]):
            return INVALID_VALUE
        self.enqueue(stream, lambda: ctypes.memmove(target, source, size))
        return self._in_context()

    def _in_context(self):
        return 0 if getattr(self.current, "context", None) else NO_CONTEXT


class Kind(enum.Enum):
    INPUT = enum.auto()
    OUTPUT = enum.auto()


class Layer:
    def __init__(self, node, tensors):
        self.name, self.type = node.name, types.SimpleNamespace(name=node.op_type.upper())
        self.inputs, self.outputs = ([tensors.get(name) for name in names] for names in (node.input, node.output))
        self.num_inputs, self.num_outputs = len(self.inputs), len(self.outputs)

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]


class Tensor:
    def __init__(self, value):
        kind = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        self.name = value.name
        self.dtype = types.SimpleNamespace(name={"float16": "HALF", "float32": "FLOAT"}.get(kind, kind.upper()))
        self._dims = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        self._ranked = value.type.tensor_type.HasField("shape")

    @property
    def shape(self):
        if not self._ranked:
            raise ValueError("__len__() should return >= 0")
        return tuple(self._dims)


def faults_of(model):
    """Why TensorRT would not take a graph."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield f"No importer registered for op: {node.op_type}"
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = constants[node.input[2]]
            if zero.any() or zero.dtype != np.int8:
                yield "Non-zero zero point is not supported"


def module(driver, version="11.4.0.106", capabilities=()):
    """A module like `tensorrt`; with compute capabilities, like `tensorrt_rtx`."""
    found = types.ModuleType("tensorrt")
    found.__version__ = version
    severity = enum.IntEnum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3})
    members = {f"SM{c.replace('.', '')}": int(c.replace(".", "")) for c in capabilities}
    found.ComputeCapability = enum.IntEnum("ComputeCapability", {"NONE": 0, "CURRENT": 1} | members)
    found.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", {"STRONGLY_TYPED": 1})
    found.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "LAYER_NAMES_ONLY DETAILED")
    found.LayerInformationFormat = enum.Enum("LayerInformationFormat", "ONELINE JSON")
    found.TensorIOMode = Kind
    found.nptype = lambda dtype: dtype

    class ILogger:
        Severity = severity

        def __init__(self):
            self.made = True  # the real one crashes if a subclass forgets to call this

    class IProfiler:
        def __init__(self):
            self.made = True

    class Network:
        def __init__(self, flags):
            assert flags == 1 << found.NetworkDefinitionCreationFlag.STRONGLY_TYPED
            self.model = None

        @property
        def num_layers(self):
            return len(self.model.graph.node)

        def get_layer(self, index):
            graph = self.model.graph
            known = onnx.shape_inference.infer_shapes(self.model).graph
            return Layer(graph.node[index], {v.name: Tensor(v) for v in (*graph.input, *graph.output, *known.value_info)})

    class OnnxParser:
        def __init__(self, network, logger):
            assert logger.made
            self.network, self.faults = network, []

        def parse(self, content):
            self.network.model = onnx.ModelProto.FromString(content)
            self.faults = list(faults_of(self.network.model))
            return not self.faults

        @property
        def num_errors(self):
            return len(self.faults)

        def get_error(self, index):
            return types.SimpleNamespace(desc=lambda: self.faults[index])

    class Profile:
        def __init__(self):
            self.shapes = {}

        def set_shape(self, name, smallest, best, largest):
            assert all(a <= b <= c for a, b, c in zip(smallest, best, largest, strict=True))
            self.shapes[name] = (smallest, best, largest)

    class Config:
        def __init__(self):
            self.profiles, self.aims, self.num_compute_capabilities, self.profiling_verbosity = [], {}, 0, None

        def add_optimization_profile(self, profile):
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def set_compute_capability(self, capability, index):
            self.aims[index] = capability.name
            return index < self.num_compute_capabilities

    class Builder:
        def __init__(self, logger):
            assert logger.made
            self.logger = logger

        def create_network(self, flags):
            return Network(flags)

        def create_builder_config(self):
            return Config()

        def create_optimization_profile(self):
            return Profile()

        def build_serialized_network(self, network, config):
            names = {v.name for v in network.model.graph.input}
            if names != set(config.profiles[0].shapes):
                self.logger.log(severity.ERROR, f"no profile for {names}")
                return None
            head = json.dumps({"shapes": config.profiles[0].shapes, "aims": config.aims}).encode()
            assert config.profiling_verbosity is found.ProfilingVerbosity.DETAILED
            return memoryview(b"STUB" + len(head).to_bytes(4, "big") + head + network.model.SerializeToString())

    class Context:
        def __init__(self, engine):
            self.engine, self.shapes, self.addresses, self.profiler = engine, {}, {}, None

        def set_input_shape(self, name, shape):
            self.shapes[name] = shape
            return True

        def set_tensor_address(self, name, address):
            self.addresses[name] = address

        def get_tensor_shape(self, name):
            feed = {n: np.zeros(self.shapes[n], self.engine.types[n]) for n in self.engine.inputs}
            return self.engine.session.run([name], feed)[0].shape

        def execute_async_v3(self, stream):
            if set(self.addresses) != set(self.engine.names):
                return False
            driver.enqueue(stream, lambda addresses=dict(self.addresses), shapes=dict(self.shapes): self._execute(addresses, shapes))
            if self.profiler is not None:
                for node in self.engine.model.graph.node:
                    self.profiler.report_layer_time(node.name, 0.25)
            return True

        def _execute(self, addresses, shapes):
            feed = {n: driver.array(addresses[n], self.engine.types[n], shapes[n]) for n in self.engine.inputs}
            for name, value in zip(self.engine.outputs, self.engine.session.run(self.engine.outputs, feed), strict=True):
                driver.array(addresses[name], value.dtype, value.shape)[...] = value

    class Engine:
        def __init__(self, head, model):
            self.head, self.model = head, model
            self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            values = [*model.graph.input, *model.graph.output]
            self.types = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in values}
            self.inputs, self.outputs = [v.name for v in model.graph.input], [v.name for v in model.graph.output]
            self.names = [*self.inputs, *self.outputs]
            self.num_io_tensors = len(self.names)

        def get_tensor_name(self, index):
            return self.names[index]

        def get_tensor_mode(self, name):
            return Kind.INPUT if name in self.inputs else Kind.OUTPUT

        def get_tensor_dtype(self, name):
            return self.types[name]

        def get_tensor_profile_shape(self, name, profile):
            return self.head["shapes"][name]

        def create_execution_context(self):
            return Context(self)

        def create_engine_inspector(self):
            body = json.dumps({"Layers": [node.name for node in self.model.graph.node]})
            return types.SimpleNamespace(get_engine_information=lambda form: body)

    class Runtime:
        def __init__(self, logger):
            assert logger.made

        def deserialize_cuda_engine(self, content):
            if not content.startswith(b"STUB"):
                return None
            size = int.from_bytes(content[4:8], "big")
            return Engine(json.loads(content[8 : 8 + size]), onnx.ModelProto.FromString(content[8 + size :]))

    for kind in (ILogger, IProfiler, OnnxParser, Builder, Runtime):
        setattr(found, kind.__name__, kind)
    return found
