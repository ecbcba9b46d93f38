// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// RestoreLog is the name that runc gives CRIU's log, in its work directory.
const RestoreLog = "restore.log"

// ConfigAnnotation names CRIU's configuration file for a container; runc hands
// it to CRIU, which lets it override the request (criu/config.c: the RPC
// configuration file is applied last).
const ConfigAnnotation = "org.criu.config"

// cgroupImage is there if the checkpoint holds the container's cgroups.
const cgroupImage = "cgroup.img"

// actionEnv is set by CRIU for action scripts (criu/action-scripts.c).
const actionEnv = "CRTOOLS_SCRIPT_ACTION"

// RestoreConfig is what CRIU is told beside runc's request.
type RestoreConfig struct {
	// Dir receives the files; it is the container's own.
	Dir string
	// Images is the directory that will be restored.
	Images string
	// Hold is a program that CRIU runs at "post-restore", with every task complete
	// and stopped, with Dir as its argument; CRIU goes on only if it exits with 0.
	// Empty: CRIU goes on at once.
	Hold string
	// External are the sources of mounts that were dumped with Config.External, by
	// mount point.
	External map[string]string
}

// Write makes the configuration that lets runc's restore work for a cohort
// checkpoint: connections, locks and external unix sockets, which runc's own callers
// do not ask for. The path of the file is returned; it goes into [ConfigAnnotation].
func (r RestoreConfig) Write() (string, error) {
	lines := []string{
		"tcp-established",
		"file-locks",
		"ext-unix-sk",
		"link-remap",
		fmt.Sprintf("verbosity %d", logLevel),
	}
	if _, err := os.Stat(filepath.Join(r.Images, cgroupImage)); err != nil {
		// Its argument is an optional one, which getopt takes only in the same word:
		// "manage-cgroups ignore" means "soft" (criu/config.c).
		lines = append(lines, "manage-cgroups=ignore")
	}
	if r.Hold != "" {
		// A shell decides in a millisecond that an action is not for us; the
		// program is started for the one that is.
		script := filepath.Join(r.Dir, "criu-action")
		text := "#!/bin/sh\n[ \"$" + actionEnv + "\" = post-restore ] || exit 0\nexec " + quote(r.Hold) + " " + quote(r.Dir) + "\n"
		if err := os.WriteFile(script, []byte(text), 0o700); err != nil {
			return "", fmt.Errorf("write CRIU action script: %w", err)
		}
		lines = append(lines, "action-script "+script)
	}
	for _, dest := range slices.Sorted(maps.Keys(r.External)) {
		lines = append(lines, fmt.Sprintf("external mnt[%s]:%s", dest, r.External[dest]))
	}
	conf := filepath.Join(r.Dir, "criu.conf")
	if err := os.WriteFile(conf, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		return "", fmt.Errorf("write CRIU configuration: %w", err)
	}
	return conf, nil
}

// quote makes one word of s for a shell.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
