// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cohort-project/cohort/runtime/ops"
)

func restoreCommand(o *options) *cobra.Command {
	var opts ops.RestoreOptions
	var binds []string
	cmd := &cobra.Command{
		Use:   "restore [flags] REF",
		Short: "Bring a group back from its images",
		Long: `Restore creates a container from each member's image and releases all of them
together, in network namespaces rebuilt with their addresses. REF must be in
containerd's image store: pull it first if it is in a registry.

One member alone is restored by any client:
  ctr run --runtime io.containerd.cohort.v2 --snapshotter cohort REF-MEMBER ID`,
		Example: `  cohort restore registry.example/shop:1
  cohort restore --id-suffix -copy --group shop-copy registry.example/shop:1`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			opts.Ref = args[0]
			opts.Binds = map[string]string{}
			for _, b := range binds {
				dest, src, ok := strings.Cut(b, "=")
				if !ok || !filepath.IsAbs(dest) || !filepath.IsAbs(src) {
					return usage("--bind %q: give DESTINATION=SOURCE, both absolute paths", b)
				}
				opts.Binds[filepath.Clean(dest)] = src
			}
			switch opts.TCPOutside {
			case "close", "keep":
			default:
				return usage("--tcp-outside %q: use close or keep", opts.TCPOutside)
			}
			return o.host(cmd, func(ctx context.Context, h *ops.Host) error {
				p := newProgress(o.err)
				opts.Progress = p.Step
				res, err := h.Restore(ctx, opts)
				p.Close()
				if err != nil {
					return err
				}
				if o.json {
					return printJSON(o.out, res)
				}
				for _, w := range res.Warnings {
					fmt.Fprintf(o.err, "warn: %s\n", w)
				}
				fmt.Fprintf(o.out, "%s: group %s, %d members running again after %.0f ms\n", res.Ref, res.Group, len(res.Members), res.TotalMS)
				rows := [][]string{{"MEMBER", "ID", "PID"}}
				for _, m := range res.Members {
					rows = append(rows, []string{m.Name, m.ID, fmt.Sprint(m.Pid)})
				}
				return table(o.out, rows)
			})
		},
	}
	f := cmd.Flags()
	f.StringVar(&opts.Group, "group", "", "name of the restored group (default: as checkpointed)")
	f.StringVar(&opts.IDSuffix, "id-suffix", "", "appended to the containers' ids, so that a copy can run beside the original")
	f.StringArrayVar(&binds, "bind", nil, "DESTINATION=SOURCE of a bind mount that the checkpoint does not hold; may be repeated")
	f.StringVar(&opts.TCPOutside, "tcp-outside", "close", "TCP connections with ends outside of the group: close or keep")
	return cmd
}
