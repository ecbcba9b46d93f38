// SPDX-License-Identifier: Apache-2.0

package criu

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Container is what runc recorded of a running container in its state.json
// (libcontainer's State; only the members that a dump needs are decoded).
type Container struct {
	ID                  string         `json:"id"`
	InitPid             int            `json:"init_process_pid"`
	InitStart           uint64         `json:"init_process_start"` // as in proc(5), stat field 22
	Config              configs.Config `json:"config"`
	ExternalDescriptors []string       `json:"external_descriptors"`
}

// LoadContainer reads the state that runc keeps below root (a directory for
// one containerd namespace).
func LoadContainer(root, id string) (*Container, error) {
	path := filepath.Join(root, id, "state.json")
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read the OCI runtime's state of container %s: %w", id, err)
	}
	c := &Container{}
	if err := json.Unmarshal(b, c); err != nil {
		return nil, fmt.Errorf("decode %s: %w", path, err)
	}
	return c, nil
}

// nsKeys are the names by which runc hands namespaces to CRIU on restore
// (libcontainer/criu_linux.go, criuNsToKey).
var nsKeys = map[configs.NamespaceType]struct{ file, key string }{
	configs.NEWNET: {"net", "extRootNetNS"},
	configs.NEWPID: {"pid", "extRootPidNS"},
}

// dumpOptions builds the request, in terms that runc's restore understands.
func (c *Container) dumpOptions(freezer string, external []string) (*rpc.CriuOpts, error) {
	// Where all tasks are in the container's own cgroup there is nothing to
	// remember: runc puts a restored container into its new one. Collecting the
	// properties of all controllers costs 14 ms of the stop.
	cg := rpc.CriuCgMode_IGNORE
	if hasChildren(freezer) {
		cg = rpc.CriuCgMode_SOFT
	}
	lock := rpc.CriuNetworkLockMethod_SKIP
	opts := &rpc.CriuOpts{
		LogLevel:          proto.Int32(logLevel),
		LogFile:           proto.String(LogFile),
		Root:              proto.String(c.Config.Rootfs),
		Pid:               proto.Int32(int32(c.InitPid)),
		NotifyScripts:     proto.Bool(true),
		LeaveRunning:      proto.Bool(true),
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: &cg,
		TcpEstablished:    proto.Bool(true),
		// A connection that nobody has accepted yet is reset by the restore, rather
		// than failing the dump.
		TcpSkipInFlight: proto.Bool(true),
		ExtUnixSk:       proto.Bool(true),
		FileLocks:       proto.Bool(true),
		LinkRemap:       proto.Bool(true),
		OrphanPtsMaster: proto.Bool(true),
		GhostLimit:      proto.Uint32(ghostLimit),
		// The group's own rules hold the network: CRIU's lock is one chain per
		// namespace, and two dumps in one namespace would unlock each other.
		NetworkLock: &lock,
	}
	if err := c.addNamespaces(opts); err != nil {
		return nil, err
	}
	c.addMounts(opts)
	for _, dest := range external {
		opts.ExtMnt = append(opts.ExtMnt, &rpc.ExtMountMap{Key: proto.String(dest), Val: proto.String(dest)})
	}
	return opts, nil
}

// hasChildren tells whether a cgroup has cgroups below it.
func hasChildren(dir string) bool {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return true
	}
	return slices.ContainsFunc(entries, os.DirEntry.IsDir)
}

// addNamespaces declares the network namespace external in every case: cohort
// captures and rebuilds it itself. (CRIU would start ip and iptables-save with
// the container frozen, and restores "lo" down.) A pid namespace is external
// where the container joined it by path.
func (c *Container) addNamespaces(opts *rpc.CriuOpts) error {
	for _, ns := range c.Config.Namespaces {
		k, ok := nsKeys[ns.Type]
		if !ok || (ns.Type == configs.NEWPID && ns.Path == "") {
			continue
		}
		var st unix.Stat_t
		path := fmt.Sprintf("/proc/%d/ns/%s", c.InitPid, k.file)
		if err := unix.Stat(path, &st); err != nil {
			return fmt.Errorf("look up %s namespace of container %s: %w", k.file, c.ID, &fs.PathError{Op: "stat", Path: path, Err: err})
		}
		opts.External = append(opts.External, fmt.Sprintf("%s[%d]:%s", k.file, st.Ino, k.key))
	}
	return nil
}

func (c *Container) addMounts(opts *rpc.CriuOpts) {
	add := func(key, val string) {
		opts.ExtMnt = append(opts.ExtMnt, &rpc.ExtMountMap{Key: proto.String(key), Val: proto.String(val)})
	}
	for _, m := range c.Config.Mounts {
		dest := strings.TrimPrefix(m.Destination, c.Config.Rootfs)
		switch m.Device {
		case "bind":
			add(dest, dest)
		case "cgroup":
			if c.Config.Namespaces.Contains(configs.NEWCGROUP) {
				continue // a mount of its own, CRIU restores it
			}
			for _, p := range c.cgroupMounts(dest) {
				add(p, p)
			}
		}
	}
	for _, p := range c.Config.MaskPaths {
		// runc hides files behind /dev/null and directories behind a tmpfs.
		if fi, err := os.Stat(fmt.Sprintf("/proc/%d/root/%s", c.InitPid, p)); err == nil && !fi.IsDir() {
			add(p, "/dev/null")
		}
	}
	for _, d := range c.Config.Devices {
		add(d.Path, d.Path)
	}
}

// cgroupMounts lists the controllers bound below dest (cgroup v1 without a
// cgroup namespace).
func (c *Container) cgroupMounts(dest string) (out []string) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", c.InitPid))
	if err != nil {
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		fields := strings.Fields(sc.Text())
		if len(fields) > 4 && strings.HasPrefix(fields[4], dest+"/") && strings.Contains(sc.Text(), " - cgroup ") {
			out = append(out, fields[4])
		}
	}
	return out
}

// descriptorsFile tells runc's restore which of the first descriptors are pipes
// of the caller's (libcontainer/criu_linux.go, descriptorsFilename).
const descriptorsFile = "descriptors.json"

func (c *Container) writeDescriptors(imagesDir string) error {
	fds := c.ExternalDescriptors
	if fds == nil {
		fds = []string{}
	}
	b, err := json.Marshal(fds)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(imagesDir, descriptorsFile), b, 0o600); err != nil {
		return fmt.Errorf("write descriptors of container %s: %w", c.ID, err)
	}
	return nil
}
