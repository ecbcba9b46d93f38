// SPDX-License-Identifier: Apache-2.0

package ops

import (
	"net/url"
	"os"

	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/cohort-project/cohort/oci"
)

// streams gives a restored container the kinds of standard streams that it had. Nobody is at
// their other ends: what it writes is thrown away, and its input is at its end. Who wants
// to read and write restores with a client.
//
// Where it had pipes they have to be pipes again. CRIU puts in their place whatever it inherits, and a
// host's /dev/null would be a file that is nowhere in the container: it could not be
// checkpointed again.
func streams(ck *oci.Checkpoint) cio.Creator {
	switch piped := func(kind string) bool { return kind == oci.StdioPipe }; {
	case ck.Terminal:
		// A fifo would fill, and stop the processes.
		return cio.TerminalLogURI(&url.URL{Path: os.DevNull})
	case !piped(ck.Stdio.Stdin) && !piped(ck.Stdio.Stdout) && !piped(ck.Stdio.Stderr):
		return cio.NullIO
	default:
		// With a file as its log the shim makes pipes, and copies. An input that is not
		// named it leaves out.
		log := (&url.URL{Scheme: "file", Path: os.DevNull}).String()
		return func(string) (cio.IO, error) {
			return drain{cio.Config{Stdin: os.DevNull, Stdout: log, Stderr: log}}, nil
		}
	}
}

// drain is the client's side of streams that the shim serves alone.
type drain struct{ config cio.Config }

func (d drain) Config() cio.Config { return d.config }
func (drain) Cancel()              {}
func (drain) Wait()                {}
func (drain) Close() error         { return nil }
