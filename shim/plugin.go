// SPDX-License-Identifier: Apache-2.0

package shim

import (
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"golang.org/x/sys/unix"
)

// The plugin takes the place of containerd's own "task" plugin of the runc shim.
func init() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			pp, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			ss, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			return newService(ic.Context, pp.(shim.Publisher), ss.(shutdown.Service), ic.Properties[plugins.PropertyGRPCAddress])
		},
	})
}

// ownAddress is the address of the socket that containerd's shim start passed
// on as the first extra descriptor.
func ownAddress() string {
	sa, err := unix.Getsockname(3)
	if err != nil {
		return ""
	}
	if un, ok := sa.(*unix.SockaddrUnix); ok {
		return "unix://" + un.Name
	}
	return ""
}
