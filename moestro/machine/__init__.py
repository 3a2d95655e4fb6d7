"""This machine: what it has, how fast it is when measured, its memory and threads. `moestro doctor` shows it.

`describe_machine` only reads, which takes a few milliseconds beside importing torch; `measure_machine` computes for
some seconds. Two functions change the whole process: `use_threads` and `keep_freed_memory`. Only commands call them;
`moestro.train` and `moestro.load` leave the settings of the calling program alone.
"""

from moestro.machine.describe import Machine as Machine
from moestro.machine.describe import describe_machine as describe_machine
from moestro.machine.describe import instruction_sets as instruction_sets
from moestro.machine.install import how_to_build as how_to_build
from moestro.machine.install import how_to_install as how_to_install
from moestro.machine.install import pip as pip
from moestro.machine.measure import Measurement as Measurement
from moestro.machine.measure import last_cache_bytes as last_cache_bytes
from moestro.machine.measure import measure_machine as measure_machine
from moestro.machine.memory import GIB as GIB
from moestro.machine.memory import MemoryShortageError as MemoryShortageError
from moestro.machine.memory import explain_memory_errors as explain_memory_errors
from moestro.machine.memory import is_memory_error as is_memory_error
from moestro.machine.memory import keep_freed_memory as keep_freed_memory
from moestro.machine.memory import memory_bytes as memory_bytes
from moestro.machine.memory import memory_limit as memory_limit
from moestro.machine.memory import peak_memory_gib as peak_memory_gib
from moestro.machine.memory import process_memory_gib as process_memory_gib
from moestro.machine.memory import require_memory as require_memory
from moestro.machine.memory import return_freed_memory as return_freed_memory
from moestro.machine.memory import usable_bytes as usable_bytes
from moestro.machine.threads import cpu_quota as cpu_quota
from moestro.machine.threads import loaded_openmp as loaded_openmp
from moestro.machine.threads import usable_cores as usable_cores
from moestro.machine.threads import usable_threads as usable_threads
from moestro.machine.threads import use_threads as use_threads
