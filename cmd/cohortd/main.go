// SPDX-License-Identifier: Apache-2.0

// Command cohortd is cohort's host daemon: the snapshotter behind containerd's
// proxy plugin, and the service that captures live snapshots. One runs per root.
//
// Containers do not depend on it: it can be stopped, killed and started again while
// they run.
package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/log"
	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/api/version"
	"github.com/cohort-project/cohort/snapshotter/volume"
)

func main() {
	if err := command().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "cohortd:", err)
		os.Exit(1)
	}
}

func command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "cohortd",
		Short: "The snapshotter and storage daemon of cohort",
		Long: `cohortd serves containerd's snapshots API (containerd: [proxy_plugins.cohort]) and
captures the storage of running containers.

The backend is chosen by what the disk of --root can do: btrfs, shared extents
(reflink), or else a btrfs in an image file of its own, ROOT.img, mounted over ROOT.
The mount stays when cohortd ends, because containers run on it; "cohortd umount"
takes it away.`,
		Example: `  cohortd --root /var/lib/cohort --metrics 127.0.0.1:9455
  cohortd umount --root /var/lib/cohort`,
		Args:          cobra.NoArgs,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			return log.SetLevel(o.logLevel)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return serve(cmd.Context(), o)
		},
	}
	cmd.SetVersionTemplate("{{.Name}} {{.Version}}\n")
	p := cmd.PersistentFlags()
	p.StringVar(&o.root, "root", "/var/lib/cohort", "directory that holds everything")
	p.StringVar(&o.logLevel, "log-level", "info", "trace, debug, info, warn or error")
	f := cmd.Flags()
	f.StringVar(&o.backend, "backend", volume.Auto, "auto, btrfs, reflink or copy")
	f.StringVar(&o.address, "address", "", "socket of the snapshots service (default ROOT/snapshotter.sock)")
	f.StringVar(&o.metrics, "metrics", "off", "address for Prometheus, such as 127.0.0.1:9455, or off")

	cmd.AddCommand(&cobra.Command{
		Use:     "umount",
		Aliases: []string{"cleanup"},
		Short:   "Unmount the image from ROOT and free its loop device",
		Long: `Unmount ROOT.img from ROOT, which frees its loop device. Without an image there is nothing
to do. It is refused while cohortd or a container uses it. The image file is kept.`,
		Example: `  cohortd umount --root /var/lib/cohort`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root, err := volume.Resolve(o.root)
			if err != nil {
				return err
			}
			unlock, err := lockRoot(root)
			if err != nil {
				return err
			}
			defer unlock()
			return volume.Unmount(cmd.Context(), root)
		},
	})
	return cmd
}

// options are the command line.
type options struct {
	root, backend, address, metrics, logLevel string
}

// snapshotterAddress is where the snapshots service listens.
func (o options) snapshotterAddress(root string) string {
	if o.address == "" {
		return filepath.Join(root, "snapshotter.sock")
	}
	return strings.TrimPrefix(o.address, "unix://")
}
