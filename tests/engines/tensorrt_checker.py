"""Checks every TensorRT name in a source file against the API of TensorRT 11.0, which this machine cannot load.

It reads the file's syntax tree and works out which expressions are TensorRT objects. Conventions for the code that it reads
(``engines/tensorrt*.py`` and every file that imports ``tensorrt``):

1. **The module** is a name or attribute called ``trt``, ``_trt``, ``tensorrt``, ``library`` or ``_library`` (also after
   ``import tensorrt as …``). In those files these names mean nothing else. ``import tensorrt as trt`` under ``TYPE_CHECKING``
   is what mypy reads; a function that is given the module as a parameter best calls it ``library``, since a parameter called
   ``trt`` would hide the alias from annotations in its body.
2. **Objects** are inferred from constructors, methods and properties: ``builder = library.Builder(logger)``,
   ``builder.create_network(0)``, ``parser.get_error(i).desc()``, ``network.get_layer(i).type``. Loops, comprehensions,
   ``with … as``, unpacking, ``a if c else b``, ``a or b``, ``:=``, closures, and returns and attributes of classes of the files
   are followed.
3. **What cannot be inferred is annotated** with ``"trt.IExecutionContext"`` in quotes: every parameter, return and dataclass
   field that holds a TensorRT object, also in ``X | None``, ``list[…]``, ``tuple[…]``, ``dict[…, …]``, ``Mapping``,
   ``Sequence``, ``Iterable``, ``Iterator``, ``type[…]``; ``cast("trt.X", value)`` works, too. A function that takes such an
   object says so: passing one to a parameter of a function of these files which is annotated otherwise is an error, unless
   with ``object``. What is annotated with another type (``Any``, ``str``) holds no TensorRT object.
4. **Attributes of TensorRT objects** must exist. Calls must fit the number of positional arguments and the keywords of one
   overload, without ``*`` or ``**``; TensorRT objects that are passed must be of the parameter's class. Properties that are set
   must be writable. Enum members are ``library.BuilderFlag.REFIT``, or ``library.BuilderFlag.__members__[text]`` for text.
   ``getattr`` and ``hasattr`` take literals. Ask for ``library.__version__``; what else is outside the API file stands with a
   reason in ``tensorrt_api.MODULE_FACTS``.
5. **Subclasses** (``class Progress(library.IProgressMonitor)``) override methods that exist, with the same number of parameters;
   helpers of their own begin with ``_``. An ``__init__`` calls ``super().__init__()`` first, or TensorRT crashes.
   ``layer.__class__ = library.IAttentionInputLayer`` makes ``layer`` one.
6. **Nothing slips through**: an attribute on an object that is not known to be TensorRT's but whose name TensorRT has and
   nobody else (``device_memory_size_v2``, ``execute_async_v3``), or nearly has (``execute_async_v2``), is an error that asks
   for an annotation; so is an attribute on what a TensorRT call returns without saying what it is.
"""
