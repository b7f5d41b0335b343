"""ROS parameters with default, range and a sentence each; configuring a node refuses wrong ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vla_autoprune.errors import InputError

if TYPE_CHECKING:
    from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult
    from rclpy.node import Node
    from rclpy.parameter import Parameter as RosParameter

Value = bool | int | float | str


@dataclass(frozen=True)
class Parameter:
    """One parameter of a node.

    Attributes:
        name: with its unit, as `deadline_ms`.
        default: its type is the parameter's type; whole numbers are taken for floats, too.
        description: one sentence for `ros2 param describe`.
        low: smallest number allowed, itself included.
        high: largest number allowed, itself included.
        choices: the texts allowed; empty allows any.
    """

    name: str
    default: Value
    description: str
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """What values may be, for people."""
        if self.choices:
            return ", ".join(repr(choice) for choice in self.choices)
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return "a text"
        kind = "whole numbers" if isinstance(self.default, int) else "finite numbers"
        return f"{kind} {self.low:g}..{self.high:g}" if self._bounded else kind

    @property
    def _bounded(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)

    def checked(self, value: Any) -> Value:
        """The value, in the parameter's type.

        Raises:
            InputError: it is of another type, out of range or none of the choices.
        """
        if isinstance(self.default, float) and type(value) is int:
            value = float(value)
        if type(value) is type(self.default):
            if isinstance(value, str):
                fits = not self.choices or value in self.choices
            else:
                fits = math.isfinite(value) and self.low <= value <= self.high
            if fits:
                return value
        raise InputError(f"parameter {self.name} is {value!r}; allowed: {self.allowed}")

    def descriptor(self) -> ParameterDescriptor:
        """What `ros2 param describe` shows; typing is left to `checked`, which takes 5 for 5.0."""
        from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor

        descriptor = ParameterDescriptor(
            name=self.name,
            description=self.description,
            additional_constraints=f"allowed: {self.allowed}",
            dynamic_typing=True,
        )
        low, high = self.low, self.high
        if isinstance(self.default, float) and self._bounded:
            descriptor.floating_point_range = [FloatingPointRange(from_value=low, to_value=high)]
        elif type(self.default) is int and self._bounded:
            descriptor.integer_range = [IntegerRange(from_value=int(low), to_value=int(high), step=1)]
        return descriptor


class NodeParameters:
    """The parameters of a node: declared at once, read when it is configured, fixed until it is cleaned up.

    Args:
        node: gets the parameters declared.
        parameters: what to declare.
    """

    def __init__(self, node: Node, parameters: Sequence[Parameter]) -> None:
        from rclpy.exceptions import InvalidParameterValueException

        self._node = node
        self._by_name = {parameter.name: parameter for parameter in parameters}
        self._fixed = False
        for parameter in parameters:
            descriptor = parameter.descriptor()
            try:
                node.declare_parameter(parameter.name, parameter.default, descriptor)
            except InvalidParameterValueException:
                # A node that cannot be made cannot say why: the value is refused when it is configured.
                descriptor.floating_point_range = []
                descriptor.integer_range = []
                node.declare_parameter(parameter.name, parameter.default, descriptor)
        node.add_on_set_parameters_callback(self._on_set)

    def read(self) -> dict[str, Any]:
        """All values, checked; from now on they cannot be set until `release`.

        Raises:
            InputError: one is not allowed; the message names it, its value and what is.
        """
        values = {
            name: parameter.checked(self._node.get_parameter(name).value)
            for name, parameter in self._by_name.items()
        }
        self._fixed = True
        return values

    def release(self) -> None:
        """Let parameters be set again."""
        self._fixed = False

    def _on_set(self, changes: list[RosParameter]) -> SetParametersResult:
        from rcl_interfaces.msg import SetParametersResult

        ours = [change for change in changes if change.name in self._by_name]
        if ours and self._fixed:
            reason = f"{ours[0].name} is read when the node is configured: clean it up, set, configure again"
            return SetParametersResult(successful=False, reason=reason)
        try:
            for change in ours:
                self._by_name[change.name].checked(change.value)
        except InputError as error:
            return SetParametersResult(successful=False, reason=str(error))
        return SetParametersResult(successful=True)
